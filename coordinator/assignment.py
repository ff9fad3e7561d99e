"""Which rank owns which chunk, and which ranks read it: pure arithmetic on small integers.

A chunk is one of the C equal parts of a context; a rank is a node's place in the world. Under causal masking
chunk j is read by the chunks after it, so its payload goes only to the ranks that own one of those. Nothing
here moves bytes; `node.exchange` uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from netem.errors import ConfigError

Mode = Literal["contiguous", "zigzag", "auto"]


class Assignment:
    """Chunks to ranks, fixed for one generation.

    `chunks_of_rank[r]` are the chunks of rank r. Together they must be 0 … C−1, each once, and every rank must have at
    least one. Raises `ConfigError` otherwise.
    """

    def __init__(self, chunks_of_rank: Sequence[Sequence[int]]) -> None:
        self._chunks = tuple(tuple(sorted(chunks)) for chunks in chunks_of_rank)
        owned = sorted(chunk for chunks in self._chunks for chunk in chunks)
        if not owned or owned != list(range(len(owned))) or not all(self._chunks):
            raise ConfigError(
                f"assignment = {self.to_lists()}: each chunk from 0 up needs one owner, each rank a chunk"
            )
        self._owner = [0] * len(owned)
        for rank, chunks in enumerate(self._chunks):
            for chunk in chunks:
                self._owner[chunk] = rank

    @property
    def n_chunks(self) -> int:
        """C, the chunks of a context."""
        return len(self._owner)

    @property
    def n_ranks(self) -> int:
        """N, the ranks of the world."""
        return len(self._chunks)

    def owner(self, chunk: int) -> int:
        """The rank that owns `chunk`."""
        return self._owner[self._known(chunk)]

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of `rank`, rising."""
        return self._chunks[rank]

    def readers_of(self, chunk: int) -> tuple[int, ...]:
        """The ranks, rising, without the owner, that own any chunk after `chunk`: where its payload goes."""
        owner = self.owner(chunk)
        return tuple(rank for rank, own in enumerate(self._chunks) if rank != owner and own[-1] > chunk)

    def weights(self) -> list[float]:
        """Each rank's share of the chunks, and so of the tokens; they sum to 1. These weigh an average."""
        return [len(own) / self.n_chunks for own in self._chunks]

    def to_lists(self) -> list[list[int]]:
        """Chunks by rank, as the roster carries them; `Assignment(lists)` is the way back."""
        return [list(chunks) for chunks in self._chunks]

    def digest(self) -> str:
        """32 hex digits by which nodes see that they have the same assignment."""
        return hashlib.blake2b(repr(self._chunks).encode(), digest_size=16).hexdigest()

    def _known(self, chunk: int) -> int:
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"chunk {chunk} of {self.n_chunks}")
        return chunk

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assignment) and self._chunks == other._chunks

    def __hash__(self) -> int:
        return hash(self._chunks)

    def __repr__(self) -> str:
        return f"Assignment({self.to_lists()})"


def assign(chunks: int, nodes: int, mode: Mode = "contiguous", chunks_per_node: Sequence[int] = ()) -> Assignment:
    """Give `chunks` chunks to `nodes` ranks.

    `contiguous` gives nearly equal runs, the earlier ranks one more where they do not divide; `zigzag` deals the chunks
    to and fro, so that with C = 2N rank i owns i and 2N−1−i (an odd number of rounds, from three on, ends with three
    that are even together); `chunks_per_node` gives contiguous runs of these lengths. Raises `ConfigError` where a rank
    would own nothing or the counts do not add up, and for `auto`: whoever starts a run puts one of the others in its
    place first.
    """
    if nodes > chunks:
        raise ConfigError(
            f"coordinator.nodes = {nodes}: more nodes than chunks ({chunks}), some would own nothing; "
            f"set coordinator.nodes to at most {chunks}, or cut the context into more chunks (model.chunks)"
        )
    if chunks_per_node:
        if len(chunks_per_node) != nodes or sum(chunks_per_node) != chunks or min(chunks_per_node) < 1:
            raise ConfigError(
                f"coordinator.chunks_per_node = {list(chunks_per_node)}: expected {nodes} counts "
                f"of at least 1 that sum to the {chunks} chunks of the model"
            )
        return Assignment(_runs(chunks_per_node))
    if mode == "auto":
        raise ConfigError(
            'coordinator.assignment = "auto": isthmus run, coordinator, plan and tunnel choose one; here, set '
            "contiguous or zigzag"
        )
    if mode == "zigzag":
        return Assignment(_dealt(chunks, nodes))
    share, rest = divmod(chunks, nodes)
    return Assignment(_runs([share + (rank < rest) for rank in range(nodes)]))


def share_out(whole: Assignment, mode: Mode, places: Sequence[int], slowness: Sequence[float] = ()) -> Assignment:
    """The chunks of `whole` for the ranks of it that are left, `places`, rising: all get as large a part of what the
    others had as they had before, at least one chunk. Contiguous runs stay such, and `zigzag` is dealt anew.

    `slowness` gives for each of them how many times slower than the others it is, 1 for those that are not: its part is
    so many times smaller, and all own contiguous runs.
    """
    slowness = slowness or [1.0] * len(places)
    if max(slowness) == 1.0:
        if len(places) == whole.n_ranks:
            return whole
        if mode == "zigzag":
            return assign(whole.n_chunks, len(places), mode)
    had = [len(whole.chunks(place)) / factor for place, factor in zip(places, slowness, strict=True)]
    parts = [count * whole.n_chunks / sum(had) for count in had]
    counts = [max(1, int(part)) for part in parts]
    while (left := whole.n_chunks - sum(counts)) != 0:  # a few chunks, by rounding
        gaps = [part - count for part, count in zip(parts, counts, strict=True)]
        if left > 0:
            counts[gaps.index(max(gaps))] += 1
        else:
            counts[min((rank for rank, count in enumerate(counts) if count > 1), key=gaps.__getitem__)] -= 1
    return Assignment(_runs(counts))


def _runs(counts: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    start = 0
    for count in counts:
        runs.append(list(range(start, start + count)))
        start += count
    return runs


def _dealt(chunks: int, nodes: int) -> list[list[int]]:
    """One chunk to each rank in every round, to and fro: two rounds give every rank the same sum of chunk numbers.

    Three rounds would not. So where an odd number of rounds comes out even, the last three are dealt otherwise.
    """
    hands: list[list[int]] = [[] for _ in range(nodes)]
    rounds, rest = divmod(chunks, nodes)
    last = chunks - 3 * nodes if rest == 0 and rounds % 2 and rounds > 1 else chunks
    for chunk in range(last):
        place = chunk % (2 * nodes)
        hands[min(place, 2 * nodes - 1 - place)].append(chunk)
    if last < chunks:
        for hand, three in zip(hands, _three_rounds(nodes), strict=True):
            hand += [last + chunk for chunk in three]
    return hands


def _three_rounds(nodes: int) -> list[tuple[int, int, int]]:
    """0 … 3N−1 in threes, one of each third, whose sums are equal, or where N is even differ by at most 1."""
    second = [nodes - (rank + 1) // 2 if rank % 2 else (nodes - 1) // 2 - rank // 2 for rank in range(nodes)]
    order = sorted(range(nodes), key=lambda rank: rank + second[rank], reverse=True)
    third = {rank: place for place, rank in enumerate(order)}
    return [(rank, nodes + second[rank], 2 * nodes + third[rank]) for rank in range(nodes)]
