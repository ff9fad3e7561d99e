"""A joiner and its donors over a wire that loses, repeats, spoils, reorders and cuts; donors die at every message.

Safety: what a joiner holds in the end is, bit for bit, what one donor has. Liveness: it ends, and well where a donor
lives and the wire heals.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from netem.errors import ProtocolError
from node.exchange.transfer_tags import Ask, Decline, Offer, Piece, TransferTag, Want
from node.train.transfer import (
    MOST_BAD_PIECES,
    MOST_CHANGES,
    PIECE_BYTES,
    Catalogue,
    Donor,
    Entry,
    Joiner,
    Keep,
    Note,
    Say,
    State,
    Terms,
    digest_of_piece,
    piece_count,
)

STEP = 40
TERMS = Terms(window=4, retry_s=1.0, patience_s=5.0, limit_s=30.0)
TICK_S = 0.25
AGREED_PIECES = 7
CAP_BYTES = 100 * PIECE_BYTES


def state(owner: int, pieces: int = 12) -> bytes:
    """Bytes of which the first pieces are the same at every member; the last piece is short."""
    agreed = random.Random(0).randbytes(64) * (AGREED_PIECES * PIECE_BYTES // 64)
    own = random.Random(1 + owner).randbytes(64) * ((pieces - AGREED_PIECES) * PIECE_BYTES // 64)
    return (agreed + own)[:-100]


def catalogue(data: bytes, step: int = STEP) -> Catalogue:
    digests = tuple(digest_of_piece(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))
    return Catalogue(step, len(data), (Entry("all", "U8", (len(data),)),), digests)


STATES = {f"node-{owner}": state(owner) for owner in range(3)}
CATALOGUES = {name: catalogue(data) for name, data in STATES.items()}

Fate = Callable[[], list[float]]
"""The delays with which a message arrives: none if it is lost, several if it is repeated."""


class Net:
    """A joiner, its donors, and what is on its way between them. `count` numbers the messages as they are sent."""

    def __init__(
        self, donors: Sequence[str] = ("node-0", "node-1", "node-2"), fate: Fate = lambda: [0.01], terms: Terms = TERMS
    ) -> None:
        self.now_s = 0.0
        self.joiner = Joiner(donors, STEP, CAP_BYTES, terms, 0.0)
        self.donors = {name: Donor(CATALOGUES[name]) for name in donors}
        self.dead: set[str] = set()
        self.fate = fate
        self.spoils: Callable[[], bool] = lambda: False
        self.on_send: Callable[[int, str], None] = lambda number, peer: None
        self.count = 0
        self.held: dict[int, bytes] = {}
        self.notes: list[str] = []
        self.sent_pieces = 0
        self._way: list[tuple[float, int, str, TransferTag, bytes, bool]] = []
        self._order = itertools.count()

    def run(self, until_s: float = 400.0) -> Net:
        self._do(self.joiner.begin(self.now_s), b"")
        while not self.joiner.over and self.now_s < until_s:
            self.now_s += TICK_S
            while self._way and self._way[0][0] <= self.now_s:
                _, _, peer, message, data, to_donor = heapq.heappop(self._way)
                self._to_donor(peer, message) if to_donor else self._to_joiner(peer, message, data)
            self._do(self.joiner.tick(self.now_s), b"")
        return self

    def kill(self, name: str, noticed: bool) -> None:
        self.dead.add(name)
        if noticed:
            self._do(self.joiner.lost(name, self.now_s), b"")

    @property
    def whole(self) -> bytes:
        return b"".join(self.held[index] for index in sorted(self.held))

    def _to_donor(self, peer: str, message: TransferTag) -> None:
        if peer in self.dead:
            return
        assert isinstance(message, Ask | Want)
        for action in self.donors[peer].receive(peer, message):
            assert isinstance(action, Say)
            data = b""
            if isinstance(action.message, Piece):
                at = action.message.index * PIECE_BYTES
                data = STATES[peer][at : at + PIECE_BYTES]
                self.sent_pieces += 1
            self._send(peer, action.message, data, False)

    def _to_joiner(self, peer: str, message: TransferTag, data: bytes) -> None:
        if isinstance(message, Offer):
            self._do(self.joiner.offered(peer, CATALOGUES[peer], self.now_s), b"")
        elif isinstance(message, Piece):
            self._do(self.joiner.arrived(peer, message.index, data, self.now_s), data)
        else:
            self._do(self.joiner.declined(peer, self.now_s), b"")

    def _do(self, actions: list[Say | Keep | Note], data: bytes) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._send(action.peer, action.message, b"", True)
            elif isinstance(action, Keep):
                self.held[action.piece] = data
            else:
                self.notes.append(action.text)

    def _send(self, peer: str, message: TransferTag, data: bytes, to_donor: bool) -> None:
        self.count += 1
        self.on_send(self.count, peer)
        if peer in self.dead:
            return
        for delay_s in self.fate():
            spoiled = bytes(len(data)) if data and self.spoils() else data
            heapq.heappush(self._way, (self.now_s + delay_s, next(self._order), peer, message, spoiled, to_donor))


def check(net: Net) -> None:
    """A joiner that is done holds what its donor has, and nothing else."""
    if net.joiner.state is State.DONE:
        assert net.whole == STATES[net.joiner.donor]
        assert net.joiner.catalogue == CATALOGUES[net.joiner.donor]


def test_a_transfer_over_a_good_wire_sends_each_piece_once() -> None:
    net = Net().run()
    assert net.joiner.state is State.DONE
    check(net)
    assert net.sent_pieces == 12 == piece_count(len(STATES["node-0"]))
    assert net.joiner.fetched_bytes == len(STATES["node-0"])
    assert net.notes == []


def test_no_more_pieces_are_under_way_than_the_window_has() -> None:
    joiner = Joiner(["node-0"], STEP, CAP_BYTES, TERMS, 0.0)
    joiner.begin(0.0)
    assert joiner.offered("node-0", CATALOGUES["node-0"], 0.0) == [Say("node-0", Want((0, 1, 2, 3)))]
    data = STATES["node-0"][2 * PIECE_BYTES : 3 * PIECE_BYTES]
    assert joiner.arrived("node-0", 2, data, 0.1) == [Keep(2), Say("node-0", Want((4,)))]
    assert joiner.arrived("node-0", 2, data, 0.1) == []  # it comes twice
    assert joiner.arrived("node-0", 9, data, 0.1) == []  # it was not asked for
    assert joiner.arrived("node-1", 3, data, 0.1) == []  # not from this donor
    assert joiner.tick(1.05) == [Say("node-0", Want((0, 1, 3)))]


MESSAGES = Net().run().count


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "silent"])
@pytest.mark.parametrize("number", range(1, MESSAGES + 1))
def test_a_donor_that_dies_at_any_message_costs_only_what_is_its_own(number: int, noticed: bool) -> None:
    """Pieces that all members have alike are not fetched again."""
    net = Net()

    def kill(count: int, peer: str) -> None:
        if count == number:
            net.kill("node-0", noticed)

    net.on_send = kill
    net.run()
    assert net.joiner.state is State.DONE
    assert net.joiner.donor == ("node-1" if number < MESSAGES or ("node-0" in net.dead and net.notes) else "node-0")
    check(net)
    agreed = sum(len(STATES["node-0"][index * PIECE_BYTES : (index + 1) * PIECE_BYTES]) for index in range(12))
    assert net.joiner.fetched_bytes <= agreed + (12 - AGREED_PIECES + TERMS.window) * PIECE_BYTES


@pytest.mark.parametrize("number", range(1, MESSAGES + 1))
def test_all_donors_dead_at_any_message_ends_the_join_and_says_so(number: int) -> None:
    net = Net()

    def kill(count: int, peer: str) -> None:
        if count == number:
            net.dead.update(STATES)

    net.on_send = kill
    net.run()
    assert net.joiner.over
    if net.joiner.state is State.FAILED:
        assert "no donor has sent anything for 30 s" in net.joiner.reason
        assert net.now_s <= 2 * TERMS.limit_s
    check(net)


@pytest.mark.parametrize("seed", range(300))
def test_random_schedules_end_and_end_well_where_a_donor_lives(seed: int) -> None:
    chance = random.Random(seed)
    loss, repetition, spoiling = chance.random() * 0.3, chance.random() * 0.3, chance.random() * 0.05
    delay_s = chance.choice([0.05, 0.5, 2.0])
    cuts = sorted(chance.random() * 20 for _ in range(2 * chance.randrange(3)))
    net = Net()

    def is_cut() -> bool:
        return sum(at < net.now_s for at in cuts) % 2 == 1

    def fate() -> list[float]:
        if is_cut() or chance.random() < loss:
            return []
        return [chance.random() * delay_s for _ in range(2 if chance.random() < repetition else 1)]

    net.fate, net.spoils = fate, lambda: chance.random() < spoiling
    deaths = {chance.randrange(1, 60): chance.random() < 0.5 for _ in range(chance.randrange(4))}

    def kill(count: int, peer: str) -> None:
        if count in deaths and net.joiner.donor:
            net.kill(net.joiner.donor, deaths[count])

    net.on_send = kill
    net.run()
    assert net.joiner.over, "it neither ends nor goes on"
    check(net)
    living = STATES.keys() - net.dead
    if net.joiner.state is State.FAILED:
        bad = any("wrong bytes" in text for text in [*net.notes, net.joiner.reason])
        assert not living or bad, net.joiner.reason


def test_a_donor_without_the_state_is_passed_over_at_once() -> None:
    net = Net()
    net.donors["node-0"] = Donor(catalogue(STATES["node-0"], step=STEP - 1))
    net.run()
    assert net.joiner.donor == "node-1"
    assert net.notes == ["node-0 does not have the state after step 40; asking node-1"]
    assert net.now_s < 10
    alone = Joiner(["node-0"], STEP, CAP_BYTES, TERMS, 0.0)
    alone.begin(0.0)
    assert alone.declined("node-0", 0.0) == []
    assert (alone.state, alone.reason) == (State.FAILED, "node-0 does not have the state after step 40")
    nobody = Joiner([], STEP, CAP_BYTES, TERMS, 0.0)
    assert nobody.begin(0.0) == []
    assert nobody.reason == "there is no donor"


@pytest.mark.parametrize(
    ("spoiled", "fault"),
    [
        (catalogue(STATES["node-0"], step=3), "the state after step 3, and that after step 40 is wanted"),
        (Catalogue(STEP, CAP_BYTES + 1, (), ()), "26214401 bytes, and this model has at most 26214400"),
        (Catalogue(STEP, 3 * PIECE_BYTES, (), (bytes(16),)), "1 pieces of 786432 bytes"),
    ],
    ids=["another step", "too large", "too few pieces"],
)
def test_a_catalogue_that_cannot_be_right_is_not_fetched(spoiled: Catalogue, fault: str) -> None:
    joiner = Joiner(["node-0", "node-1"], STEP, CAP_BYTES, TERMS, 0.0)
    joiner.begin(0.0)
    note, say = joiner.offered("node-0", spoiled, 0.0)
    assert note == Note(f"node-0 offers {fault}; asking node-1")
    assert say == Say("node-1", Ask(STEP))
    assert joiner.offered("node-0", CATALOGUES["node-0"], 0.0) == []  # it is not asked any more


def test_a_donor_that_sends_wrong_bytes_is_named_and_left() -> None:
    net = Net()
    net.spoils = lambda: net.joiner.donor == "node-0"
    net.run()
    check(net)
    assert net.joiner.donor == "node-1"
    assert net.notes == [f"node-0 has sent {MOST_BAD_PIECES} pieces with wrong bytes; asking node-1"]


def test_donors_that_offer_and_never_send_are_not_asked_for_ever() -> None:
    joiner = Joiner(["node-0", "node-1"], STEP, CAP_BYTES, Terms(limit_s=1e9), 0.0)
    joiner.begin(0.0)
    for turn in range(2 * MOST_CHANGES):
        joiner.offered(joiner.donor, CATALOGUES["node-0"], 21.0 * turn)
        joiner.tick(21.0 * turn + 20.5)
    assert joiner.state is State.FAILED


@pytest.mark.parametrize("pieces", [(12,), (0, 1, 1)], ids=str)
def test_pieces_that_do_not_exist_are_nonsense(pieces: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="node-7: asked for pieces that do not exist, or for one twice"):
        Donor(CATALOGUES["node-0"]).receive("node-7", Want(pieces))


def test_a_state_without_bytes_is_there_at_once() -> None:
    joiner = Joiner(["node-0"], STEP, CAP_BYTES, TERMS, 0.0)
    joiner.begin(0.0)
    assert joiner.offered("node-0", Catalogue(STEP, 0, (), ()), 0.0) == []
    assert joiner.state is State.DONE
    assert joiner.declined("node-0", 0.0) == joiner.lost("node-0", 0.0) == joiner.tick(99.0) == []
    assert isinstance(Decline(), Decline)
