"""The wire: how it waits for room, what it makes of buffers, and what it refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from helpers.inboxes import (
    FORMAT,
    FULL,
    KEY,
    ME,
    RING_CAP_BYTES,
    SPEC,
    WORLD,
    size,
    tag,
    waiting,
)
from helpers.worlds import Loop, tiny_config

from netem.errors import PeerLate, ProtocolError, QueueFull, RunAborted
from node.exchange.formats import FORMATS, TensorSpec
from node.exchange.inbox import Inbox, Members
from node.exchange.judge import objection
from node.exchange.passes import PassKey, PassSpec
from node.exchange.tags import RingTag, encode_tag
from node.exchange.wire import Wire, as_buffer, split_buffer
from node.measure.spans import ROUND, Spans


class Full:
    """An endpoint without room, until it has refused so often."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.sent: list[str] = []
        self.asked = threading.Event()

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None:
        if self.refusals:
            self.refusals -= 1
            self.asked.set()
            time.sleep(timeout_s / 10)
            raise QueueFull("bob: 9 bytes wait to be sent")
        self.sent.append(peer)

    def pass_on(self, peer: str, tag: bytes, buffer: memoryview, generation: int, *, flow: int = 0) -> None:
        raise AssertionError("nothing is passed on here")


def test_a_trainer_waits_for_room_to_send_and_the_wait_is_exposed() -> None:
    inbox, sender, spans = Inbox(FORMAT, RING_CAP_BYTES), Full(3), Spans()
    wire = Wire(sender, inbox, Members(1, WORLD, ME, ("ann~1", "bob~2", "cyd~3")), FORMAT, 30.0, spans)
    wire.send(2, "done", 0, 1, KEY, ())
    assert sender.sent == ["cyd~3"]
    assert spans.end().accounts_s["exposed_forward"] >= 0.04
    spans.begin(recorded=True)
    sender.refusals = 3
    with spans.span(ROUND):
        wire.send_shard(2, 0, 0, 0, torch.zeros(3))
    step = spans.end()
    assert (step.accounts_s["exposed_forward"], step.accounts_s["exposed_backward"]) == (0.0, 0.0)
    assert step.accounts_s["averaging"] >= 0.04
    assert step.record is not None
    assert [(message.name, message.rank, message.nbytes) for message in step.record.sent] == [
        ("shard 0 of round 0, hop 0", 2, 12)
    ]
    spans.begin(recorded=False)
    sender.refusals = 3
    wire.send_shard(2, 0, 0, 0, torch.zeros(3))
    assert spans.end().accounts_s["averaging"] == 0.0, "as on a thread of its own: it is not the trainer's to wait"


class Keeps:
    """An endpoint that keeps what it is given to send."""

    def __init__(self) -> None:
        self.given: list[tuple[str, list[memoryview]]] = []

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None:
        self.given.append((peer, list(buffers)))

    def pass_on(self, peer: str, tag: bytes, buffer: memoryview, generation: int, *, flow: int = 0) -> None:
        raise AssertionError("nothing is passed on here")


def test_a_payload_is_brought_into_host_memory_once_for_all_its_readers() -> None:
    """Here it has to be copied because its rows lie apart; from a GPU, always."""
    sender = Keeps()
    wire = Wire(sender, Inbox(FORMAT, RING_CAP_BYTES), Members(1, WORLD, ME, ("ann~1", "bob~2", "cyd~3")), FORMAT, 1.0)
    parts = tuple(torch.rand(*spec.shape, 2).to(spec.dtype)[..., 0] for spec in FORMAT.tensors(0, SPEC))
    assert any(not part.is_contiguous() for part in parts)
    wire.publish((0, 2), 0, 1, KEY, parts)
    (one, first), (other, second) = sender.given
    assert (one, other) == ("ann~1", "cyd~3")
    assert [torch.frombuffer(view, dtype=torch.uint8).data_ptr() for view in first] == [
        torch.frombuffer(view, dtype=torch.uint8).data_ptr() for view in second
    ]


def test_a_wait_for_room_has_a_deadline_and_ends_with_the_run() -> None:
    inbox, sender = Inbox(FORMAT, RING_CAP_BYTES), Full(1 << 30)
    world = Members(1, WORLD, ME, ("ann~1", "bob~2", "cyd~3"))
    with pytest.raises(PeerLate, match=r"waited 0 s for room to send to cyd: coordinator.step_timeout_s; bob: 9 bytes"):
        Wire(sender, inbox, world, FORMAT, 0.0).send(2, "done", 0, 1, KEY, ())
    wire = Wire(sender, inbox, world, FORMAT, 3600.0)
    sender.asked.clear()
    thread, raised = waiting(lambda: wire.send(2, "done", 0, 1, KEY, ()))
    assert sender.asked.wait(10)
    inbox.abort(RunAborted("cyd is lost"))
    thread.join(10)
    assert [str(error) for error in raised] == ["cyd is lost"]


def test_a_payload_of_another_pass_is_no_crash() -> None:
    """Its shapes are right for the warm start, and this is not one."""
    loop = Loop(tiny_config(), [[0], [1], [2], [3]], timeout_s=0)
    loop.wires[0].begin(1)
    loop.wires[1].begin(1)
    short = FORMAT.tensors(0, PassSpec(4, False))
    loop.wires[0].send(1, "kv", 0, 0, PassKey(1, PassSpec(4, False), True), tuple(torch.zeros(s.shape) for s in short))
    with pytest.raises(ProtocolError, match="bytes, expected"):
        loop.wires[1].take("kv", 0, 0, 0, 1, FORMAT.tensors(0, SPEC), torch.device("cpu"))


def test_a_shard_of_another_length_is_no_crash() -> None:
    loop = Loop(tiny_config(), [[0, 1], [2, 3]], timeout_s=0)
    loop.wires[0].send_shard(1, 7, 0, 0, torch.zeros(5))
    with pytest.raises(ProtocolError, match="20 bytes, expected 24"):
        loop.wires[1].take_shard(7, 0, 0, TensorSpec((6,), torch.float32))


def test_tensors_come_back_from_their_bytes() -> None:
    """A float32 after an odd number of bfloat16 does not lie on a word of its own."""
    sent = (
        torch.randn(3, 5).bfloat16(),
        torch.randn(2),
        torch.randn(4, 6)[:, ::2].mT,  # not contiguous
        torch.randn(1).expand(7),
    )
    body = bytearray(b"".join(as_buffer(tensor) for tensor in sent))
    specs = tuple(TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in sent)
    found = split_buffer(memoryview(body), specs)
    assert all(torch.equal(*pair) for pair in zip(found, sent, strict=True))
    assert [t.dtype for t in found] == [t.dtype for t in sent]


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_sends_crosses_memory_untouched(name: str) -> None:
    """Every type of number, out and in: the same bytes at the same place. (K's and V's, of an even width.)"""
    packed = FORMATS[name].pack(torch.randn(3, 2, 8, 300))
    chunk = tuple(tensor[1] for tensor in packed)
    for tensor in chunk:
        assert torch.frombuffer(as_buffer(tensor), dtype=torch.uint8).data_ptr() == tensor.data_ptr()
    body = torch.frombuffer(bytearray(b"".join(as_buffer(tensor) for tensor in chunk)), dtype=torch.uint8)
    specs = FORMATS[name].specs((2, 8, 300))
    found = split_buffer(memoryview(body.numpy()), specs)  # type: ignore[arg-type]
    start = body.data_ptr()
    for tensor, sent, spec in zip(found, chunk, specs, strict=True):
        assert (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) == (start, spec.dtype, spec.shape)
        assert bytes(as_buffer(tensor)) == bytes(as_buffer(sent))
        start += spec.nbytes


PEERS = ("ann~1", "bob~2", "cyd~3")


def payload_from_ann(spoil: float | None, *, judges: bool = True) -> tuple[torch.Tensor, ...]:
    """What bob's wire makes of the payload of chunk 0 from ann, in which one number may be spoiled."""
    inbox = Inbox(FORMAT, RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, PEERS))
    inbox.begin(FULL)
    named = tag()
    room = inbox.admit("ann~1", 1, encode_tag(named), size(named))
    assert room is not None
    numbers = torch.zeros(size(named) // 4)
    if spoil is not None:
        numbers[3] = spoil
    room[:] = as_buffer(numbers)
    inbox.deliver("ann~1", 1, encode_tag(named), room)
    wire = Wire(Full(0), inbox, Members(1, WORLD, ME, PEERS), FORMAT, 1.0, judges=judges)
    return wire.take("kv", 0, 0, 0, FULL, FORMAT.tensors(0, SPEC), torch.device("cpu"))


@pytest.mark.parametrize(
    ("number", "fault"), [(float("nan"), "not finite"), (float("-inf"), "not finite"), (-3e9, "as large as 3.0e[+]09")]
)
def test_numbers_with_which_no_step_can_be_done_are_refused_and_the_peer_is_named(number: float, fault: str) -> None:
    with pytest.raises(ProtocolError, match=f"ann: sent kv of chunk 0, layer 0, pass 5 .* that are {fault}") as caught:
        payload_from_ann(number)
    assert caught.value.peer == "ann~1"


def test_large_numbers_of_training_pass_and_so_does_all_where_such_steps_are_left_out() -> None:
    assert float(payload_from_ann(1e7)[0].max()) == 1e7
    payload_from_ann(None)
    assert not torch.isfinite(payload_from_ann(float("nan"), judges=False)[0]).all()


def test_a_shard_is_judged_too_and_traced_to_the_node_before() -> None:
    inbox = Inbox(FORMAT, RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, PEERS))
    named = RingTag(0, 0, 0)
    wire = Wire(Full(0), inbox, Members(1, WORLD, ME, PEERS), FORMAT, 1.0)
    for value in (1e15, torch.inf):
        room = inbox.admit("ann~1", 1, encode_tag(named), 12)
        assert room is not None
        room[:] = as_buffer(torch.tensor([0.0, value, 1.0]))
        inbox.deliver("ann~1", 1, encode_tag(named), room)
        if value == torch.inf:
            with pytest.raises(ProtocolError, match=r"ann: sent shard 0 of round 0, hop 0 with numbers .* not finite"):
                wire.take_shard(0, 0, 0, TensorSpec((3,), torch.float32))
        else:
            wire.take_shard(0, 0, 0, TensorSpec((3,), torch.float32))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "unit4"])  # it has no number that is not finite
def test_every_format_is_judged(name: str) -> None:
    numbers = torch.randn(2, 8, 300)
    assert objection(FORMATS[name].pack(numbers), 1e8) == ""
    numbers[0, 0, 0] = torch.nan
    assert objection(FORMATS[name].pack(numbers), 1e8) == "not finite"
