"""By which nodes a payload comes to its readers: straight from its owner, or passed on by other readers.

Sent straight, a payload goes up its owner's line once for each reader. With one chunk on each of N nodes that is N−1
times for the first chunk and never for the last, and where all links of a node share one line (scope `nic`, a home's),
everybody waits for the first node's line. Relayed, readers send a part of that, so that every line up carries its mean,
half as much as the first one did.

Payloads are cut into pieces, so that a reader passes on the beginning while it receives the rest, and so that the mean
need not be a whole number of payloads. Each piece takes its own way, a tree of which the owner is the root and the
other readers are the nodes; no reader gets it twice. Who sends what is dealt by `relayed`, a pure function of the
assignment: all nodes find the same.

Only payloads are relayed. Each reader's gradient of a chunk is its own, and must go up its line once, which is what it
does without a relay. Added up on the way, as many would go up each line (only the owner's line down would carry fewer),
and the sums would be rounded at every hop; so they go straight to the owner, who adds them in order of rank.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from coordinator.assignment import Assignment

MOST_PIECES = 8
"""The first piece comes after an eighth of the payload's time; with more, messages would cost more than waiting."""
LEAST_PIECE_BYTES = 16 * 1024

Tree = Mapping[int, tuple[int, ...]]
"""Of one piece: the ranks to which each rank sends it, in order; those that pass it on come first."""


class Routes:
    """The ways of all pieces of one layer's payloads: `trees[chunk][piece]`."""

    def __init__(self, trees: Sequence[Sequence[Tree]]) -> None:
        self._trees = trees
        self._sources = [
            [{target: rank for rank, targets in tree.items() for target in targets} for tree in pieces]
            for pieces in trees
        ]
        self._relays = [any(len(tree) > 1 for tree in pieces) for pieces in trees]

    def relays(self, chunk: int) -> bool:
        """Whether readers pass this chunk's payload on."""
        return self._relays[chunk]

    def pieces(self, chunk: int) -> int:
        """In how many pieces this chunk's payload goes."""
        return len(self._trees[chunk])

    def targets(self, rank: int, chunk: int, piece: int) -> tuple[int, ...]:
        """The ranks to which `rank` sends this piece."""
        return self._trees[chunk][piece].get(rank, ())

    def source(self, rank: int, chunk: int, piece: int) -> int | None:
        """The rank that sends this piece to `rank`; None where nobody does."""
        return self._sources[chunk][piece].get(rank)

    def sends(self, rank: int, chunk: int) -> list[tuple[int, int]]:
        """(piece, rank that gets it) of all that `rank` sends of this chunk, in order: first to those that pass it
        on."""
        trees = self._trees[chunk]
        all_of = [(piece, target) for piece, tree in enumerate(trees) for target in tree.get(rank, ())]
        return sorted(all_of, key=lambda one: one[1] not in trees[one[0]])

    def deliveries(self, chunk: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """(sender, receiver, bytes) of every message that brings this chunk's payload of `nbytes` bytes."""
        for piece, tree in enumerate(self._trees[chunk]):
            begin, end = span_of(piece, len(self._trees[chunk]), nbytes)
            for rank, targets in tree.items():
                for target in targets:
                    yield rank, target, end - begin


def routes_for(assignment: Assignment, relays: bool, nbytes: int) -> Routes:
    """The routes of payloads of `nbytes` bytes."""
    return relayed(assignment, pieces_in(nbytes)) if relays else direct(assignment)


def pieces_in(nbytes: int) -> int:
    """In how many pieces a payload of `nbytes` bytes is relayed."""
    return max(1, min(MOST_PIECES, nbytes // LEAST_PIECE_BYTES))


def span_of(piece: int, pieces: int, nbytes: int) -> tuple[int, int]:
    """Where a piece begins and ends in a payload of `nbytes` bytes."""
    return nbytes * piece // pieces, nbytes * (piece + 1) // pieces


@lru_cache(maxsize=64)
def direct(assignment: Assignment) -> Routes:
    """Every owner sends its payloads whole to every reader."""
    chunks = range(assignment.n_chunks)
    return Routes([[{assignment.owner(chunk): assignment.readers_of(chunk)}] for chunk in chunks])


@lru_cache(maxsize=64)
def relayed(assignment: Assignment, pieces: int) -> Routes:
    """Every rank sends about the mean of all that is sent, and owners as much of that as they can, without a hop.

    An owner sends each piece at least once, which may be more than the mean. Chunks are dealt from the last to the
    first: whoever may send a chunk (its owner and its readers) may also send every earlier one, so the chunks with the
    fewest senders are dealt first (the least flexible job first: Pinedo, "Scheduling", section 5.1).
    """
    owners = [assignment.owner(chunk) for chunk in range(assignment.n_chunks)]
    readers = [assignment.readers_of(chunk) for chunk in range(assignment.n_chunks)]
    sent = Counter[int]()
    for owner, reading in zip(owners, readers, strict=True):
        sent[owner] += pieces * bool(reading)
    mean = pieces * sum(map(len, readers)) / assignment.n_ranks
    trees: list[list[Tree]] = [[] for _ in owners]
    for chunk in reversed(range(len(owners))):
        counts = _deal(owners[chunk], readers[chunk], pieces, sent, mean)
        ways = [_tree(owners[chunk], readers[chunk], count, piece) for piece, count in enumerate(counts)]
        trees[chunk] = ways if any(len(way) > 1 for way in ways) else ways[:1]
    return Routes(trees)


def _deal(owner: int, readers: Sequence[int], pieces: int, sent: Counter[int], mean: float) -> list[Counter[int]]:
    """How often each rank sends each piece of a chunk. What is dealt is added to `sent`, which has the owner's first
    time already."""
    counts = [Counter({owner: 1}) for _ in range(pieces)] if readers else [Counter[int]()]
    for _ in readers[1:]:
        for count in counts:
            # The owner needs no further hop, and a reader that passes the piece on already makes it no longer.
            first = [owner, *(rank for rank, _ in count.most_common() if rank != owner)]
            least = min((owner, *readers), key=lambda rank: (sent[rank], -rank))
            sender = next((rank for rank in first if sent[rank] < mean), least)
            count[sender] += 1
            sent[sender] += 1
    return counts


def _tree(owner: int, readers: Sequence[int], counts: Counter[int], piece: int) -> Tree:
    """A way for one piece on which each rank sends it as often as `counts` says, those with most to pass on first.
    Readers that pass nothing on take turns from piece to piece, so that the owner's links carry about as much."""
    relays = sorted((rank for rank in readers if counts[rank]), key=lambda rank: (-counts[rank], rank))
    leaves = [rank for rank in readers if not counts[rank]]
    turn = piece % len(leaves) if leaves else 0
    waiting, senders = deque([*relays, *leaves[turn:], *leaves[:turn]]), deque([owner])
    tree: dict[int, tuple[int, ...]] = {}
    while senders:
        sender = senders.popleft()
        tree[sender] = tuple(waiting.popleft() for _ in range(counts[sender]))
        senders += [rank for rank in tree[sender] if counts[rank]]
    return tree
