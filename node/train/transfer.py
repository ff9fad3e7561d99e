"""How a node that joins gets what a member has: weights, basis, momentum, moments. Two machines without I/O or clock.

The joiner asks a donor for its catalogue, which names the tensors and gives a digest of each piece of their bytes. Then
it asks for the pieces, a few at a time, and checks each one. A message that is lost is asked for again; one that comes
twice changes nothing. Where a donor falls silent, sends wrong bytes or is lost, the next one is asked for its own
catalogue: a piece that has the same digest there is kept, and only the rest is fetched. All members agree on weights,
basis and momentum to the bit, so these are fetched once; the optimizer's moments are those of the last donor. Where no
donor is left, or none makes progress for too long, the transfer has failed: nothing but the join is lost.

`node.train.pieces` makes the catalogue and takes the bytes apart, `node.worker.handover` joins both machines to the
network.
"""

from __future__ import annotations

import enum
import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from netem.errors import ProtocolError
from node.exchange.transfer_tags import MOST_WANTED, Ask, Decline, Number, Offer, Piece, TransferTag, Want

PIECE_BYTES = 256 << 10
MOST_PIECES = 1 << 22
"""Pieces of one catalogue, at most: a terabyte."""
MOST_TENSORS = 1 << 17
MOST_BAD_PIECES = 3
"""A donor that has sent so many wrong pieces is not asked any more."""
FIRST_PAUSE_S = 0.5
"""A donor that has not answered is asked again after this time, and then after twice as long each time: it may not have
begun the generation yet."""
MOST_CHANGES = 20
"""A joiner that has turned to another donor so often gives up: each may bring other moments, and so more to fetch."""

Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: its name, its type and its shape. One that is `empty` is all zeros, and has no bytes."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    dtype: Annotated[str, Meta(max_length=8)]
    shape: Annotated[tuple[Number, ...], Meta(max_length=8)]
    empty: bool = False


class Catalogue(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a donor has after `step` steps: tensors, whose bytes follow one another, and the digest of each piece."""

    step: Number
    total_bytes: Annotated[int, Meta(ge=0, le=MOST_PIECES * PIECE_BYTES)]
    tensors: Annotated[tuple[Entry, ...], Meta(max_length=MOST_TENSORS)]
    digests: Annotated[tuple[Digest, ...], Meta(max_length=MOST_PIECES)]

    def piece_bytes(self, index: int) -> int:
        """How long a piece is; only the last one may be shorter."""
        return min(PIECE_BYTES, self.total_bytes - index * PIECE_BYTES)


def piece_count(total_bytes: int) -> int:
    """Into how many pieces so many bytes are cut."""
    return -(-total_bytes // PIECE_BYTES)


def digest_of_piece(data: bytes | memoryview) -> bytes:
    """The 16 bytes by which a piece is known."""
    return hashlib.blake2b(data, digest_size=16).digest()


# Actions.


class Say(NamedTuple):
    """Send `message` to `peer`: an `Offer` with the catalogue, a `Piece` with its bytes."""

    peer: str
    message: TransferTag


class Keep(NamedTuple):
    """This piece is right: put its bytes in their place. The action follows the message that brought it."""

    piece: int


class Note(NamedTuple):
    """Something that a person may want to know."""

    text: str


Action = Say | Keep | Note


class Terms(NamedTuple):
    """How patient a joiner is, in seconds, and how many pieces may be on their way to it."""

    window: int = 8
    retry_s: float = 5.0
    """After this time without an answer, the same is asked again."""
    patience_s: float = 20.0
    """After this time without a right piece or a catalogue, the next donor is asked."""
    limit_s: float = 120.0
    """After this time without a right piece from any donor, the transfer has failed."""


class State(enum.Enum):
    """Where a joiner is."""

    ASKING = "waiting for a catalogue"
    FETCHING = "waiting for pieces"
    DONE = "all pieces are here"
    FAILED = "no donor is left"


class Joiner:
    """Fetches the state after `step` steps from one of `donors`, of at most `cap_bytes` bytes.

    `catalogue` is that of the present donor, from FETCHING on. `have` are the digests of the pieces that are in their
    place, at first those of a transfer that was broken off. Times are seconds of any clock that does not go back.
    """

    def __init__(
        self,
        donors: Sequence[str],
        step: int,
        cap_bytes: int,
        terms: Terms,
        now_s: float,
        have: Mapping[int, bytes] | None = None,
    ) -> None:
        self.state = State.ASKING
        self.catalogue: Catalogue | None = None
        self.reason = ""
        self.fetched_bytes = 0
        self._donors = deque(donors)
        self._step = step
        self._cap_bytes = cap_bytes
        self._terms = terms
        self.have = dict(have or {})
        self._pause_s = FIRST_PAUSE_S / 2  # doubled whenever it is asked
        self._missing: deque[int] = deque()
        self._asked_s: dict[int, float] = {}  # pieces that are under way
        self._bad = 0
        self._changes = 0
        self._asked_at_s = self._donor_at_s = self._progress_at_s = now_s

    @property
    def donor(self) -> str:
        """The member that is asked; "" where none is left."""
        return self._donors[0] if self._donors else ""

    @property
    def over(self) -> bool:
        """Whether the transfer has ended, well or not."""
        return self.state in (State.DONE, State.FAILED)

    def begin(self, now_s: float) -> list[Action]:
        """Ask the first donor."""
        return self._ask(now_s)

    def offered(self, peer: str, catalogue: Catalogue, now_s: float) -> list[Action]:
        """A catalogue has come."""
        if peer != self.donor or self.state is not State.ASKING:
            return []
        if (fault := self._fault(catalogue)) is not None:
            return self._give_up(f"{peer} offers {fault}", now_s, for_good=True)
        self.state = State.FETCHING
        self.catalogue = catalogue
        self.have = {
            index: have for index, have in self.have.items() if catalogue.digests[index : index + 1] == (have,)
        }
        self._missing = deque(index for index in range(len(catalogue.digests)) if index not in self.have)
        self._asked_s.clear()
        self._donor_at_s = now_s
        return self._fetch(now_s)

    def arrived(self, peer: str, index: int, data: bytes | memoryview, now_s: float) -> list[Action]:
        """A piece has come."""
        if peer != self.donor or self.state is not State.FETCHING or index not in self._asked_s:
            return []
        assert self.catalogue is not None
        if digest_of_piece(data) != self.catalogue.digests[index]:
            self._bad += 1
            if self._bad >= MOST_BAD_PIECES:
                return self._give_up(f"{peer} has sent {self._bad} pieces with wrong bytes", now_s, for_good=True)
            self._asked_s[index] = now_s
            return [Say(peer, Want((index,)))]
        del self._asked_s[index]
        self.have[index] = self.catalogue.digests[index]
        self.fetched_bytes += len(data)
        self._donor_at_s = self._progress_at_s = now_s
        return [Keep(index), *self._fetch(now_s)]

    def declined(self, peer: str, now_s: float) -> list[Action]:
        """A donor does not have the state."""
        if peer != self.donor or self.over:
            return []
        return self._give_up(f"{peer} does not have the state after step {self._step}", now_s, for_good=True)

    def lost(self, peer: str, now_s: float) -> list[Action]:
        """A member is gone."""
        if self.over or peer not in self._donors:
            return []
        if peer == self.donor:
            return self._give_up(f"{peer} was lost", now_s, for_good=True)
        self._donors.remove(peer)
        return []

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass: ask again, or ask another one."""
        if self.over:
            return []
        if now_s - self._progress_at_s >= self._terms.limit_s:
            return self._fail(f"no donor has sent anything for {self._terms.limit_s:g} s")
        if now_s - self._donor_at_s >= self._terms.patience_s:
            return self._give_up(f"{self.donor} has sent nothing for {self._terms.patience_s:g} s", now_s)
        if self.state is State.ASKING:
            return self._ask(now_s) if now_s - self._asked_at_s >= self._pause_s else []
        late = [index for index, asked_s in self._asked_s.items() if now_s - asked_s >= self._terms.retry_s]
        return self._want(late, now_s)

    def _ask(self, now_s: float) -> list[Action]:
        self._pause_s = min(2 * self._pause_s, self._terms.retry_s)
        self._asked_at_s = now_s
        return [Say(self.donor, Ask(self._step))] if self.donor else self._fail("there is no donor")

    def _fetch(self, now_s: float) -> list[Action]:
        """Ask for more, as far as the window allows."""
        if not self._missing and not self._asked_s:
            self.state = State.DONE
            return []
        room = min(self._terms.window, MOST_WANTED) - len(self._asked_s)
        return self._want([self._missing.popleft() for _ in range(min(room, len(self._missing)))], now_s)

    def _want(self, pieces: list[int], now_s: float) -> list[Action]:
        self._asked_s |= dict.fromkeys(pieces, now_s)
        return [Say(self.donor, Want(tuple(pieces)))] if pieces else []

    def _give_up(self, reason: str, now_s: float, for_good: bool = False) -> list[Action]:
        """Turn to the next donor. What has been fetched is kept."""
        before = self._donors.popleft()
        if not for_good:
            self._donors.append(before)
        self.state, self.catalogue, self._bad = State.ASKING, None, 0
        self._donor_at_s, self._pause_s = now_s, FIRST_PAUSE_S / 2
        self._changes += 1
        if not self._donors or self._changes > MOST_CHANGES:
            return self._fail(reason)
        return [Note(f"{reason}; asking {self.donor}"), *self._ask(now_s)]

    def _fail(self, reason: str) -> list[Action]:
        self.state, self.reason = State.FAILED, reason
        return []

    def _fault(self, catalogue: Catalogue) -> str | None:
        if catalogue.step != self._step:
            return f"the state after step {catalogue.step}, and that after step {self._step} is wanted"
        if catalogue.total_bytes > self._cap_bytes:
            return f"{catalogue.total_bytes} bytes, and this model has at most {self._cap_bytes}"
        if len(catalogue.digests) != piece_count(catalogue.total_bytes):
            return f"{len(catalogue.digests)} pieces of {catalogue.total_bytes} bytes"
        return None


class Donor:
    """Answers joiners. What it offers does not change while it lives."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def receive(self, peer: str, message: Ask | Want) -> list[Action]:
        """Answer a joiner. Raises `ProtocolError` for pieces that do not exist."""
        if isinstance(message, Ask):
            return [Say(peer, Offer() if message.step == self._catalogue.step else Decline())]
        if max(message.pieces) >= len(self._catalogue.digests) or len(set(message.pieces)) < len(message.pieces):
            raise ProtocolError("asked for pieces that do not exist, or for one twice", peer=peer)
        return [Say(peer, Piece(index)) for index in message.pieces]
