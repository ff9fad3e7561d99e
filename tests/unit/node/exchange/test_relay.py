"""Payloads that readers pass on: what the inbox admits, holds and passes on, and the wires of whole worlds.

Every wire and inbox is real, and what one sends the other has at once (`helpers.worlds.Loop`). Payloads here are cut
into more pieces than in a run, where so small ones go whole.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest
import torch
from helpers.small import contexts, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, exchange_of, full_spec, tiny_config
from torch import Tensor

from coordinator.assignment import Assignment
from netem.errors import PeerLate, ProtocolError
from node.config import Config
from node.exchange import routes
from node.exchange.inbox import Inbox, Members
from node.exchange.keys import ChunkKey
from node.exchange.passes import PassKey, PassSpec
from node.exchange.payload import link_bytes, step_bytes
from node.exchange.pieces import Owed
from node.exchange.tags import ChunkTag, Piece, decode_tag, encode_tag
from node.exchange.wire import Wire, cut
from node.train.from_config import payload_format
from node.train.passes import loss_sum

ME = 3
PASS_NO = 5
NAMES = ("ann", "bob", "cyd", "dan")
FOUR = Assignment(WORLDS["4"])
CONFIG = tiny_config(compress={"mode": "dense"})
FORMAT = payload_format(CONFIG)
SPEC = PassSpec(8, False)
NBYTES = FORMAT.chunk_bytes(0, SPEC)
KEY = ChunkKey("kv", PASS_NO, 0, 0, 0)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LEAST_PIECE_BYTES", 64)


def ways() -> routes.Routes:
    return Members(1, FOUR, ME, NAMES, True).routes(NBYTES)


def piece(number: int, body: bytes, **changes: Any) -> ChunkTag:
    """The tag of a piece of chunk 0, of the pass in which the inbox is."""
    part = Piece(number, ways().pieces(0), zlib.crc32(body), True)
    fields: dict[str, Any] = {"pass_no": PASS_NO, "piece": part} | changes
    shapes = tuple(tensor.shape for tensor in FORMAT.tensors(0, SPEC))
    return msgspec.structs.replace(ChunkTag("kv", PASS_NO, 0, 0, 8, False, "float32", shapes), **fields)


def inbox_in_a_pass() -> Inbox:
    inbox = Inbox(FORMAT, 1000)
    inbox.enter(Members(1, FOUR, ME, NAMES, True))
    inbox.begin(PASS_NO)
    return inbox


def payload() -> bytes:
    return bytes(number % 251 for number in range(NBYTES))


def part(number: int) -> bytes:
    begin, end = routes.span_of(number, ways().pieces(0), NBYTES)
    return payload()[begin:end]


def sender(number: int) -> str:
    rank = ways().source(ME, 0, number)
    assert rank is not None
    return NAMES[rank]


def arrive(inbox: Inbox, number: int, **changes: Any) -> None:
    named = piece(number, part(number), **changes)
    room = inbox.admit(sender(number), 1, encode_tag(named), len(part(number)))
    assert room is not None
    room[:] = part(number)
    inbox.deliver(sender(number), 1, encode_tag(named), room)


def test_pieces_become_the_payload_in_any_order() -> None:
    inbox, count = inbox_in_a_pass(), ways().pieces(0)
    assert count == routes.MOST_PIECES
    assert len({sender(number) for number in range(count)}) > 1
    for number in reversed(range(count)):
        with pytest.raises(PeerLate, match="layer 0 from ann, which other nodes may pass on: coordinator") as caught:
            inbox.take(KEY, 0.0)
        assert caught.value.peer == ("ann" if number == count - 1 else sender(0)), "who has not sent a piece yet"
        arrive(inbox, number)
    assert inbox.arrival(KEY)[1] == NBYTES
    assert bytes(inbox.take(KEY, 0.0)) == payload()
    with pytest.raises(ProtocolError, match=r"keys and values of chunk 0, layer 0 from ann.* came twice"):
        arrive(inbox, 0)
    inbox.end(PASS_NO, 1)
    assert (inbox._admitted, inbox._held, inbox._pieces._partial) == (set(), {}, {})


def test_what_is_owed_is_passed_on_as_it_came_before_the_trainer_asks() -> None:
    """Also of a pass that has not begun here, and of a payload of which other pieces are missing."""
    inbox, passed = inbox_in_a_pass(), list[Owed]()
    inbox.relay_through(passed.append)
    numbers = range(ways().pieces(0))
    for number in numbers:
        arrive(inbox, number, pass_no=PASS_NO + 1)
        owed = [one for one in numbers[: number + 1] if ways().targets(ME, 0, one)]
        assert [one.named.piece.number for one in passed if one.named.piece] == owed
    assert passed
    for one in passed:
        assert one.named.piece is not None
        number = one.named.piece.number
        assert one.ranks == ways().targets(ME, 0, number)
        assert bytes(one.buffer) == part(number)
        assert one.tag == encode_tag(piece(number, part(number), pass_no=PASS_NO + 1))


def test_what_is_owed_waits_for_the_way_and_no_longer_than_its_generation() -> None:
    inbox, passed = inbox_in_a_pass(), list[Owed]()
    for number in range(ways().pieces(0)):
        arrive(inbox, number)
    inbox.relay_through(passed.append)
    assert [one.ranks for one in passed] == [
        ways().targets(ME, 0, number) for number in range(ways().pieces(0)) if ways().targets(ME, 0, number)
    ]
    inbox = inbox_in_a_pass()
    arrive(inbox, next(number for number in range(ways().pieces(0)) if ways().targets(ME, 0, number)))
    inbox.enter(Members(2, FOUR, ME, NAMES, True))
    passed.clear()
    inbox.relay_through(passed.append)
    assert not passed
    assert not inbox._pieces._partial


def test_bytes_that_are_not_the_owner_s_are_neither_held_nor_passed_on() -> None:
    inbox, passed = inbox_in_a_pass(), list[Owed]()
    inbox.relay_through(passed.append)
    number = next(number for number in range(ways().pieces(0)) if ways().targets(ME, 0, number))
    tag = encode_tag(piece(number, part(number)))
    room = inbox.admit(sender(number), 1, tag, len(part(number)))
    assert room is not None
    room[:] = bytes(len(room))
    with pytest.raises(ProtocolError, match=rf"ann: piece {number} of chunk 0, layer 0 is not what the chunk's owner"):
        inbox.deliver(sender(number), 1, tag, room)
    assert not passed
    assert not inbox._held


REFUSED: list[tuple[str, int, dict[str, Any], str]] = [
    ("from another than its sender", 0, {}, "piece 0 of chunk 0, which it does not owe this node"),
    ("of no such number", 0, {"piece": Piece(8, 8, 0, True)}, "piece 8 of chunk 0, which it does not owe"),
    ("of another count", 0, {"piece": Piece(0, 7, 0, True)}, "kv of chunk 0 in 7 pieces, expected 8 pieces"),
    ("whole", 0, {"piece": None}, "kv of chunk 0 in one message, expected 8 pieces"),
    ("of a chunk that goes whole", 2, {"chunk": 2}, "kv of chunk 2 in 8 pieces, expected one message"),
    ("of an own chunk", 0, {"chunk": 3}, "kv of chunk 3, which it does not owe this node"),
]


@pytest.mark.parametrize(
    ("rank", "changes", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_piece_that_is_not_owed_is_refused(rank: int, changes: dict[str, Any], message: str) -> None:
    if not changes:
        rank = next(rank for rank in (1, 2) if rank != ways().source(ME, 0, 0))
    with pytest.raises(ProtocolError, match=message) as caught:
        inbox_in_a_pass().admit(NAMES[rank], 1, encode_tag(piece(0, part(0), **changes)), len(part(0)))
    assert caught.value.peer == NAMES[rank]


def test_pieces_are_refused_where_nothing_is_relayed() -> None:
    inbox = Inbox(FORMAT, 1000)
    inbox.enter(Members(1, FOUR, ME, NAMES))
    inbox.begin(PASS_NO)
    with pytest.raises(ProtocolError, match="in 8 pieces, expected one message"):
        inbox.admit("ann", 1, encode_tag(piece(0, part(0))), len(part(0)))


def test_what_was_coming_in_when_its_pass_ended_is_not_kept_nor_passed_on() -> None:
    inbox, passed = inbox_in_a_pass(), list[Owed]()
    inbox.relay_through(passed.append)
    number = next(number for number in range(ways().pieces(0)) if ways().targets(ME, 0, number))
    tag = encode_tag(piece(number, part(number)))
    room = inbox.admit(sender(number), 1, tag, len(part(number)))
    assert room is not None
    room[:] = part(number)
    inbox.end(PASS_NO, 1)
    inbox.deliver(sender(number), 1, tag, room)
    assert (inbox._held, inbox._pieces._partial, passed) == ({}, {}, [])
    assert inbox.admit(sender(number), 1, tag, len(room)) is None, "it comes too late"


def test_a_node_that_passes_on_may_be_as_many_passes_behind_as_any() -> None:
    inbox = inbox_in_a_pass()
    arrive(inbox, 0, pass_no=PASS_NO + 2)
    with pytest.raises(ProtocolError, match=f"is at pass {PASS_NO + 3}, this node at {PASS_NO}"):
        arrive(inbox, 0, pass_no=PASS_NO + 3)


def test_parts_of_buffers_are_cut_without_a_copy() -> None:
    one, two = bytearray(b"abcde"), bytearray(b"fgh")
    parts = cut([memoryview(one), memoryview(two)], 3, 6)
    assert b"".join(parts) == b"def"
    one[3], two[0] = ord("x"), ord("y")
    assert b"".join(parts) == b"xey"
    assert [bytes(part) for part in cut([memoryview(one), memoryview(two)], 5, 8)] == [b"ygh"]


def forwards(config: Config, wire: Wire, rank: int, world: str, count: int) -> list[Tensor]:
    """Forwards of so many passes of one rank, none of them followed by its backward yet."""
    model, exchange = small_model(config), exchange_of(config, WORLDS[world], rank, wire)
    spec = full_spec(config)
    return [loss_sum(model, exchange, contexts(config, seed), spec, draw=(0, seed)) for seed in range(count)]


@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_four_passes_in_flight_are_relayed_to_the_byte(mode: str) -> None:
    """The first owner is through with all four forwards before the others, who pass its payloads on, have begun one."""
    config = tiny_config(compress={"mode": mode})  # of one pass
    in_flight = tiny_config(compress={"mode": mode}, train={"batch": 8, "micro_batches": 4})
    spec = full_spec(config)
    totals = {}
    for relays in (False, True):
        loop = Loop(in_flight, WORLDS["4"], relays=relays)
        first = forwards(config, loop.wires[0], 0, "4", 4)

        def work(rank: int, _: ThreadWire, loop: Loop = loop, first: list[Tensor] = first) -> float:
            losses = first if rank == 0 else forwards(config, loop.wires[rank], rank, "4", 4)
            for loss in reversed(losses):
                loss.backward()
            return sum(loss.item() for loss in losses)

        totals[relays] = run_ranks(4, work)
        for rank, inbox in enumerate(loop.inboxes):
            assert (inbox._held, inbox._admitted, inbox._open, inbox._pieces._partial) == ({}, set(), set(), {})
            sent, formula = loop.wires[rank].sent_bytes, step_bytes(loop.payload, FOUR, rank, spec, relays=relays)
            assert sent["compressed"] == 4 * (formula.compressed_forward + formula.compressed_backward)
            assert sent["dense"] == 4 * (formula.dense_forward + formula.dense_backward)
    assert totals[True] == totals[False], "a relay changes no bit"


def test_what_a_relay_saves_is_counted_once_for_every_reader() -> None:
    config = tiny_config()
    totals = []
    for relays in (False, True):
        loop = Loop(config, WORLDS["4"], relays=relays)
        run_ranks(4, lambda rank, _, loop=loop: forwards(config, loop.wires[rank], rank, "4", 1)[0].backward())
        sent = [wire.sent_bytes for wire in loop.wires]
        totals.append({use: sum(count[use] for count in sent) for use in ("uncompressed", "replaced", "compressed")})
    assert totals[0] == totals[1]
    assert totals[0]["replaced"] > 0


def test_an_evaluation_that_is_relayed_is_counted_as_one() -> None:
    config = tiny_config()
    loop = Loop(config, WORLDS["4"], relays=True)

    def work(rank: int, _: ThreadWire) -> None:
        exchange = exchange_of(config, WORLDS["4"], rank, loop.wires[rank])
        with torch.no_grad():
            handle = exchange.begin(full_spec(config), trains=False)
            own = torch.from_numpy(contexts(config)[:, :-1]).reshape(2, 4, 8).movedim(1, 0)[list(exchange.own)]
            small_model(config).logits(own, handle)
            handle.finish_forward()

    run_ranks(4, work)
    for rank, wire in enumerate(loop.wires):
        formula = step_bytes(loop.payload, FOUR, rank, full_spec(config), relays=True)
        assert wire.sent_bytes["evaluation"] == formula.compressed_forward + formula.dense_forward
        assert wire.sent_bytes["compressed"] == wire.sent_bytes["dense"] == wire.sent_bytes["uncompressed"] == 0


def test_a_trace_has_a_payload_once_for_every_reader() -> None:
    loop = Loop(CONFIG, WORLDS["4"], relays=True)
    loop.recorders[0].begin(recorded=True)
    tensors = tuple(torch.zeros(spec.shape) for spec in FORMAT.tensors(0, SPEC))
    for wire in loop.wires:
        wire.begin(1)
    loop.wires[0].publish((1, 2, 3), 0, 0, PassKey(1, SPEC, True), tensors)
    record = loop.recorders[0].end().record
    assert record is not None
    assert [(sent.name, sent.rank, sent.nbytes) for sent in record.sent] == [
        ("kv of chunk 0, layer 0, pass 1", rank, NBYTES) for rank in (1, 2, 3)
    ]
    (span,) = record.spans
    arrived_s = [inbox.arrival(ChunkKey("kv", 1, 0, 0, 0))[0] for inbox in loop.inboxes[1:]]
    for sent in record.sent:  # the arrow begins in the span, and before anyone has all pieces
        assert span.began_s <= sent.sent_s <= min(span.ended_s, *arrived_s)


def test_links_by_the_formula_add_up_and_uplinks_are_even_in_the_forward() -> None:
    spec = full_spec(CONFIG)
    plain, relayed = (link_bytes(FORMAT, FOUR, spec, relays=relays) for relays in (False, True))
    assert plain[1] == relayed[1]
    assert plain[3] == relayed[3], "gradients go straight"
    received = [[sum(row[rank] for row in part[2]) for rank in range(4)] for part in (plain, relayed)]
    assert received[0] == received[1], "every reader gets a payload once"
    assert [sum(row) for row in plain[2]] == [3 * 3 * NBYTES, 3 * 2 * NBYTES, 3 * NBYTES, 0]
    assert [sum(row) for row in relayed[2]] == [4.5 * NBYTES] * 4


def test_a_payload_that_goes_whole_says_so() -> None:
    """The tag of a run without a relay has no piece, and neither has that of a chunk that nobody passes on."""
    config = tiny_config(compress={"mode": "dense"})
    sent: list[ChunkTag] = []

    class Noting(Loop):
        def hand_over(self, sender: Members, peer: str, tag: bytes, body: bytes) -> None:
            named = decode_tag(tag, peer)
            assert isinstance(named, ChunkTag)
            sent.append(named)

    loop = Noting(config, WORLDS["4"], relays=True)
    tensors = tuple(torch.zeros(spec.shape) for spec in FORMAT.tensors(0, SPEC))
    for rank, chunk in ((0, 0), (2, 2)):
        readers = FOUR.readers_of(chunk)
        loop.wires[rank].publish(readers, 0, chunk, PassKey(1, SPEC, True), tensors)
    assert [tag.piece is None for tag in sent if tag.chunk == 2] == [True]
    assert all(tag.piece is not None for tag in sent if tag.chunk == 0)


def test_a_node_that_passes_nothing_on_holds_nobody_up_for_longer_than_the_limit() -> None:
    """Its own silence is found by others; whoever waits for what should come through it gives up in time."""

    class Dead(Loop):
        def hand_over(self, sender: Members, peer: str, tag: bytes, body: bytes) -> None:
            if peer != "node-3":
                super().hand_over(sender, peer, tag, body)

    config = tiny_config()
    loop = Dead(config, WORLDS["4"], timeout_s=0.2, relays=True)
    first = forwards(config, loop.wires[0], 0, "4", 1)
    assert first
    with pytest.raises(PeerLate, match=r"waited 0.2 s for the keys and values of chunk 0, layer 0 from node-0, which"):
        forwards(config, loop.wires[1], 1, "4", 1)
