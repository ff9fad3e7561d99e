"""Both sides of a transfer in one process: inboxes and threads are real, the wire is a function call."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from helpers.worlds import WORLDS, Loop, tiny_config

from netem.errors import GenerationOver, IsthmusError, ProtocolError, QueueFull
from netem.network import Profile
from node.exchange.tags import decode_tag, encode_tag
from node.exchange.transfer_tags import Ask, Offer, Piece, Want
from node.train.pieces import Packed, pack
from node.train.transfer import PIECE_BYTES, Terms
from node.worker.handover import Handover, terms_for

STEP, CAP = 7, 1 << 26
TERMS = Terms(window=3, retry_s=0.2, patience_s=1.0, limit_s=3.0)
WORLD = WORLDS["4"]


def state(rank: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(rank)
    return {"weight": torch.arange(200_000.0), "optimizer.a": torch.randn(150_000, generator=source)}


class Nodes:
    """Four nodes; what one sends the others get at once, unless `spoil` says otherwise."""

    def __init__(self) -> None:
        self.loop = Loop(tiny_config(), WORLD)
        self.spoil: Callable[[str, str, object, bytes], bytes | None] = lambda sender, peer, tag, body: body
        self.sent: list[tuple[str, str, object]] = []
        self.handovers = [Handover(Way(self, rank), inbox) for rank, inbox in enumerate(self.loop.inboxes)]

    def serve(self, *ranks: int, step: int = STEP) -> None:
        for rank in ranks:
            self.handovers[rank].serve(lambda rank=rank: pack(state(rank), step))

    def fetch(self, rank: int, step: int = STEP) -> dict[str, torch.Tensor]:
        return self.handovers[rank].fetch(self.loop.members[rank], step, CAP, TERMS)

    def close(self) -> None:
        for handover in self.handovers:
            handover.close()


class Way:
    """One node's sender."""

    def __init__(self, nodes: Nodes, rank: int) -> None:
        self._nodes, self._rank = nodes, rank

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None:
        nodes, members = self._nodes, self._nodes.loop.members[self._rank]
        me, named = members.peers[self._rank], decode_tag(tag, "")
        nodes.sent.append((me, peer, named))
        body = nodes.spoil(me, peer, named, b"".join(buffers))
        if body is not None:
            nodes.loop.hand_over(members, peer, tag, body)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    before = threading.active_count()
    made = Nodes()
    yield made
    made.close()
    assert threading.active_count() == before


def equal(got: dict[str, torch.Tensor], rank: int) -> bool:
    return got.keys() == state(rank).keys() and all(torch.equal(got[name], state(rank)[name]) for name in got)


def pieces(nodes: Nodes) -> list[tuple[str, int]]:
    return [(sender, tag.index) for sender, _, tag in nodes.sent if isinstance(tag, Piece)]


def test_two_nodes_join_at_once(nodes: Nodes) -> None:
    nodes.serve(0, 1)
    results: dict[int, dict[str, torch.Tensor]] = {}
    threads = [threading.Thread(target=lambda rank=rank: results.update({rank: nodes.fetch(rank)})) for rank in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(equal(results[rank], 0) for rank in (2, 3))
    assert len(pieces(nodes)) == 2 * 6


def test_nothing_is_packed_before_it_is_asked_for(nodes: Nodes) -> None:
    packed: list[int] = []

    def share() -> Packed:
        packed.append(1)
        return pack(state(0), STEP)

    nodes.handovers[0].serve(share)
    assert packed == []
    nodes.fetch(3)
    nodes.fetch(2)
    assert packed == [1]


def test_a_member_that_joins_too_is_passed_over(nodes: Nodes) -> None:
    nodes.serve(1)
    release = threading.Event()
    nodes.spoil = lambda sender, peer, tag, body: body if sender != "node-1" or release.wait(20) else None
    first = threading.Thread(target=lambda: nodes.fetch(0))
    first.start()
    threading.Timer(0.3, release.set).start()
    assert equal(nodes.fetch(3), 1)
    first.join(30)


def test_a_donor_that_is_silent_costs_only_its_own_pieces(nodes: Nodes) -> None:
    nodes.serve(0, 1)
    nodes.spoil = lambda sender, peer, tag, body: (
        None if sender == "node-0" and isinstance(tag, Piece) and tag.index >= 2 else body
    )
    assert equal(nodes.fetch(3), 1)
    fetched = pieces(nodes)
    assert ("node-0", 0) in fetched
    assert ("node-1", 0) not in fetched  # the same at both
    assert ("node-1", 5) in fetched


def test_a_wire_that_loses_and_spoils(nodes: Nodes) -> None:
    nodes.serve(0, 1, 2)
    chance = random.Random(4)

    def spoil(sender: str, peer: str, tag: object, body: bytes) -> bytes | None:
        if chance.random() < 0.2:
            return None
        return bytes(len(body)) if isinstance(tag, Piece) and chance.random() < 0.05 else body

    nodes.spoil = spoil
    got = nodes.fetch(3)
    assert any(equal(got, rank) for rank in range(3))


def test_a_generation_that_ends_breaks_the_transfer_off_and_the_next_one_goes_on(nodes: Nodes) -> None:
    nodes.serve(0)
    inbox = nodes.loop.inboxes[3]

    def spoil(sender: str, peer: str, tag: object, body: bytes) -> bytes | None:
        if isinstance(tag, Piece) and tag.index == 4:
            inbox.announce(2)  # node-0 was lost
            return None
        return body

    nodes.spoil = spoil
    with pytest.raises(GenerationOver):
        nodes.fetch(3)
    nodes.close()
    nodes.loop.begin(2, WORLDS["2x2"], ("node-1", "node-3"))
    nodes.handovers[1] = Handover(Way(nodes, 0), nodes.loop.inboxes[1])
    nodes.handovers[1].serve(lambda: pack(state(1), STEP))
    again = Handover(Way(nodes, 1), nodes.loop.inboxes[3])
    again._begun = nodes.handovers[3]._begun
    nodes.spoil = lambda sender, peer, tag, body: body
    nodes.sent.clear()
    assert equal(again.fetch(nodes.loop.members[1], STEP, CAP, TERMS), 1)
    assert [index for _, index in pieces(nodes)] == [3, 4, 5]  # the first three are agreed on, and were here


def test_nobody_who_can_give_it_is_an_error_that_says_so(nodes: Nodes) -> None:
    nodes.serve(0, 1, 2, step=STEP - 1)
    with pytest.raises(IsthmusError, match=r"^this node cannot join: node-2 does not have the state after step 7$"):
        nodes.fetch(3)
    silent = Nodes()
    with pytest.raises(IsthmusError, match="this node cannot join: no donor has sent anything for 3 s"):
        silent.fetch(3)


def test_a_catalogue_that_is_nonsense_is_left_for_the_next_donor(nodes: Nodes) -> None:
    nodes.serve(0, 1)
    nodes.spoil = lambda sender, peer, tag, body: b"\xc1" if sender == "node-0" and isinstance(tag, Offer) else body
    assert equal(nodes.fetch(3), 1)


def test_what_was_not_asked_for_is_not_taken(nodes: Nodes) -> None:
    inbox, peer = nodes.loop.inboxes[0], "node-1"
    assert inbox.admit(peer, 1, encode_tag(Piece(0)), PIECE_BYTES) is None
    assert inbox.admit(peer, 1, encode_tag(Offer()), 100) is None
    assert inbox.admit("node-9", 1, encode_tag(Ask(STEP)), 0) is None  # no member
    assert inbox.admit(peer, 0, encode_tag(Ask(STEP)), 0) is None  # of an older generation
    for tag, nbytes in ((Piece(0), PIECE_BYTES + 1), (Ask(STEP), 1), (Want((1,)), 1), (Offer(), 1 << 40)):
        with pytest.raises(ProtocolError, match="bytes, at most"):
            inbox.admit(peer, 1, encode_tag(tag), nbytes)


def test_a_full_queue_holds_a_donor_up_until_its_generation_is_over(nodes: Nodes) -> None:
    nodes.serve(0)
    full = threading.Event()

    def spoil(sender: str, peer: str, tag: object, body: bytes) -> bytes | None:
        if isinstance(tag, Piece):
            full.set()
            raise QueueFull("no room")
        return body

    nodes.spoil = spoil
    inbox = nodes.loop.inboxes[3]
    raised: list[type[Exception]] = []

    def join() -> None:
        try:
            nodes.fetch(3)
        except IsthmusError as error:
            raised.append(type(error))

    joiner = threading.Thread(target=join)
    joiner.start()
    assert full.wait(20)
    nodes.close()
    inbox.announce(2)
    joiner.join(20)
    assert raised == [GenerationOver]


def test_terms_fit_the_slowest_link() -> None:
    fast = terms_for(Profile(), "node-3", ["node-0"])
    assert (fast.window, fast.retry_s) == (64, 2.0)
    slow = terms_for(Profile(rate_bps=1e6, latency_s=0.1), "node-3", ["node-0"])
    assert slow.window == 2
    assert slow.retry_s > 2 * PIECE_BYTES * 8 / 1e6
    assert slow.retry_s < slow.patience_s < slow.limit_s
    long = terms_for(Profile(rate_bps=3e8, latency_s=0.15), "node-3", ["node-0"])
    assert long.window * PIECE_BYTES * 8 >= 3e8 * 0.3  # it fills the link
