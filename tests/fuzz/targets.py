"""What the fuzzers call: each target takes any bytes and must end without an exception, within bounded memory.

A target raises only where a decoder or machine lets through something other than a `ProtocolError`, keeps more than its
caps allow, or breaks one of its own assertions. `EXAMPLES` are well-formed inputs, from which a fuzzer starts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence

from coordinator.assignment import Assignment
from coordinator.config import CoordinatorConfig
from coordinator.events import Faulted, Received, Tick
from coordinator.member import Member
from coordinator.messages import (
    CONTROL_TAG,
    PROTOCOL_VERSION,
    Commit,
    Go,
    Heartbeat,
    Join,
    Leave,
    Ready,
    Roster,
    RosterEntry,
    Round,
    Saved,
    Stop,
    Vote,
    Welcome,
    control_buffer,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from coordinator.plan import RunPlan
from coordinator.run import Phase, Run
from fuzz import surroundings
from netem import frames
from netem.assembly import Assembler
from netem.errors import IsthmusError, ProtocolError
from netem.limits import Limits
from netem.link import Link, Terms, Verdict
from netem.network import UNSHAPED
from netem.schedule import Schedule

Target = Callable[[bytes], None]

RUN_ID = "run"
LIMITS = Limits(max_open_messages=8, max_message_bytes=1 << 16, max_tag_bytes=256)
TERMS = Terms(1 << 20, 1 << 20, 1.0, 30.0, 0.01)
MOST_PIECES = 64
KEY = "y(KsFeDA.TFu/c#ZX@Qe]>6rj8eS0*J*@n[6!pa+"


def pieces(data: bytes) -> Iterator[bytes]:
    """The input cut into parts, each behind two bytes that give its length."""
    place = 0
    for _ in range(MOST_PIECES):
        if place + 2 > len(data):
            return
        (length,) = struct.unpack_from(">H", data, place)
        place += 2
        yield data[place : place + length]
        place += length


def joined(parts: Sequence[bytes]) -> bytes:
    """An input that `pieces` cuts into these parts."""
    return b"".join(struct.pack(">H", len(part)) + part for part in parts)


def frame(data: bytes) -> None:
    """The first part of a frame, and a payload of the length that its first two bytes say."""
    try:
        head, stamp_s = frames.unstamped(data[2:])
        header = frames.decode(head, max_tag_bytes=LIMITS.max_tag_bytes)
        frames.check_payload(header, int.from_bytes(data[:2], "big"))
    except ProtocolError:
        return
    assert math.isfinite(stamp_s)
    assert len(header.tag) <= LIMITS.max_tag_bytes


def node_message(data: bytes) -> None:
    """A message to the coordinator, which is written and read again where it is legal."""
    try:
        message = decode_from_node(data, "node-0")
    except ProtocolError:
        return
    _same(message, decode_from_node(encode(message), "node-0"))


def coordinator_message(data: bytes) -> None:
    """A message to a node."""
    try:
        message = decode_from_coordinator(data)
    except ProtocolError:
        return
    _same(message, decode_from_coordinator(encode(message)))


def _same(one: object, other: object) -> None:
    assert repr(one) == repr(other)  # which NaN is equal to


class _Receiver:
    """Takes control messages, and counts the bytes that it has lent."""

    def __init__(self) -> None:
        self.lent_bytes = 0
        self.delivered = 0

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        room = control_buffer(tag, total_bytes, peer)
        self.lent_bytes += 0 if room is None else room.nbytes
        return room

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.delivered += 1
        self.lent_bytes -= buffer.nbytes

    def failed(self, error: IsthmusError) -> None:
        raise AssertionError(error)


def stream(data: bytes) -> None:
    """Frames of one peer, one after another, as the engine gives them to the link and the assembler."""
    receiver = _Receiver()
    link, assembler = Link(RUN_ID, 1, TERMS), Assembler("node-0~1", receiver, LIMITS)
    now = 0.0
    parts = list(pieces(data))
    for first, payload in zip(parts[::2], parts[1::2], strict=False):
        now += 0.01
        try:
            head, _ = frames.unstamped(first)
            header = frames.decode(head, max_tag_bytes=LIMITS.max_tag_bytes)
            frames.check_payload(header, len(payload))
        except ProtocolError:
            continue
        if link.renewed(header):
            assembler.reset()
            receiver.lent_bytes = 0
        if link.receive(header, now) is not Verdict.NEXT or not frames.intact(header, memoryview(payload)):
            continue
        link.accept(len(payload), now)
        try:
            assembler.add(header, memoryview(payload), 0)
        except ProtocolError:
            continue
        finally:
            link.check(now)
        assert len(assembler._open) <= LIMITS.max_open_messages
        assert receiver.lent_bytes <= MOST_PIECES * LIMITS.max_message_bytes
    assert not link.released


CONFIG = CoordinatorConfig(nodes=2)
PLAN = RunPlan(
    run_name="run",
    chunks=4,
    steps=3,
    batch=2,
    config_digest="cfg",
    rounds_for=lambda step: ["weights"],
    schedule=Schedule(UNSHAPED),
)
PEERS = ("node-0~0", "node-1~1", "node-2~2")


def coordinator(data: bytes) -> None:
    """Messages of three peers to a coordinator's machine; the first byte of each says which peer, and what time."""
    run = Run(CONFIG, PLAN, 0.0)
    now = 0.0
    for part in pieces(data):
        if run.phase is Phase.FINISHED or not part:
            return
        peer = PEERS[part[0] % len(PEERS)]
        now += (part[0] >> 2) / 8
        try:
            event = Received(peer, decode_from_node(part[1:], peer))
            run.handle(event, now)
        except ProtocolError as error:
            if run.phase is not Phase.FINISHED:
                run.handle(Faulted(peer, str(error)), now)
        if run.phase is not Phase.FINISHED:
            run.handle(Tick(), now)
        assert len(run.membership) <= CONFIG.nodes


JOIN = Join(
    name="node-0", key=KEY, version=PROTOCOL_VERSION, run="run", config_digest="cfg", address="tcp://127.0.0.1:1"
)


def member(data: bytes) -> None:
    """Messages of a coordinator to a node's machine, which joins, and is ready and votes where it may."""
    one = Member(CONFIG)
    one.send(JOIN, 0.0)
    now = 0.0
    for part in pieces(data):
        now += 0.1
        try:
            one.receive(decode_from_coordinator(part), now)
        except ProtocolError as error:
            one.lose(str(error))
        for wish in (Ready(step=one.go.step + 1 if one.go else 0), Vote(round_id=0, ok=True)):
            try:
                one.send(wish, now)
            except ProtocolError:
                continue
        one.tick(now)


def tensor_tag(data: bytes) -> None:
    """The tag of a tensor, at a node's inbox: no more is lent than the config gives that tensor."""
    inbox = _inbox()
    peer = ("ann", "cyd")[data[0] & 1] if data else "ann"
    total_bytes = int.from_bytes(data[1:5], "big")
    try:
        room = inbox.admit(peer, 1, data[5:], total_bytes)
    except ProtocolError:
        return
    assert room is None or room.nbytes == total_bytes <= 1 << 20
    if room is not None:
        inbox.deliver(peer, 1, data[5:], room)


def _inbox() -> object:
    from helpers.inboxes import make_inbox  # torch is needed for this one only

    return make_inbox()


def _header(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "version": frames.VERSION,
        "run_id": RUN_ID,
        "kind": frames.Kind.DATA,
        "generation": 0,
        "incarnation": 5,
        "heard": 0,
        "sequence": 0,
        "ack": 0,
    }
    return frames.stamped(frames.encode(frames.Header(**(fields | changes))), 1.0)  # type: ignore[arg-type]


def _tensor_examples() -> list[bytes]:
    from helpers.inboxes import size, tag

    from node.exchange.tags import RingTag, encode_tag

    named = tag()
    chunk = b"\0" + size(named).to_bytes(4, "big") + encode_tag(named)
    return [chunk, b"\0" + (8).to_bytes(4, "big") + encode_tag(RingTag(0, 0, 0))]


def _examples() -> dict[str, list[bytes]]:
    import zlib

    words = [
        JOIN,
        Ready(step=0, metrics={"loss": 1.5}, digests={"basis": "ab"}),
        Vote(round_id=0, ok=True, digest="d"),
        Saved(step=1),
        Heartbeat(),
        Leave(),
    ]
    entries = [
        RosterEntry(name=f"node-{rank}", peer=PEERS[rank], rank=rank, address=f"tcp://127.0.0.1:{rank + 1}", key=KEY)
        for rank in range(2)
    ]
    answers = [
        Welcome(rank=-1, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0),
        Roster(generation=1, members=entries, assignment=Assignment([[0, 1], [2, 3]]).to_lists()),
        Go(step=0, generation=1, cursor=0, rounds=[Round(round_id=0, kind="weights", weights=[0.5, 0.5])]),
        Commit(round_id=0),
        Stop(ok=True),
    ]
    body = encode(words[0])
    whole = _header(total_bytes=len(body), checksum=zlib.crc32(body), tag=CONTROL_TAG)
    half = body[: len(body) // 2]
    begun = _header(total_bytes=len(body), checksum=zlib.crc32(half), tag=CONTROL_TAG)
    rest = _header(sequence=1, total_bytes=len(body), offset=len(half), checksum=zlib.crc32(body[len(half) :]))
    said = [bytes([rank]) + encode(word) for word in words for rank in range(2)]
    return {
        "frame": [len(body).to_bytes(2, "big") + whole, b"\0\0" + _header(kind=frames.Kind.ACK)],
        "stream": [joined([whole, body]), joined([begun, half, rest, body[len(half) :]])],
        "node_message": [encode(word) for word in words],
        "coordinator_message": [encode(word) for word in answers],
        "coordinator": [joined(said), joined(said[::-1])],
        "member": [joined([encode(word) for word in answers])],
        "tensor_tag": _tensor_examples(),
        **{name: [joined(parts) for parts in found] for name, found in surroundings.examples().items()},
    }


TARGETS: dict[str, Target] = {
    "frame": frame,
    "stream": stream,
    "node_message": node_message,
    "coordinator_message": coordinator_message,
    "coordinator": coordinator,
    "member": member,
    "tensor_tag": tensor_tag,
    "survey": lambda data: surroundings.survey(list(pieces(data))),
    "guest": lambda data: surroundings.guest(list(pieces(data))),
    "files": lambda data: surroundings.files(list(pieces(data))),
}
EXAMPLES: dict[str, list[bytes]] = _examples()


def driven(name: str) -> Target:
    """The target behind a first byte. Where that is odd, the rest is the input; else the rest damages an example.

    MessagePack is decoded in C, where a fuzzer sees no branches, so it would seldom come through by chance. Damage is
    in groups of four bytes: two for the place, one for what is done there, one for a byte.
    """
    target, examples = TARGETS[name], EXAMPLES[name]

    def drive(data: bytes) -> None:
        if not data or data[0] & 1:
            target(data[1:])
            return
        body = bytearray(examples[(data[0] >> 1) % len(examples)])
        for at in range(1, len(data) - 3, 4):
            damage(body, int.from_bytes(data[at : at + 2], "big"), data[at + 2], data[at + 3])
        target(bytes(body))

    return drive


def damage(body: bytearray, place: int, how: int, byte: int) -> None:
    """Set, flip, insert, remove or repeat something at a place."""
    place %= len(body) + 1
    match how % 5:
        case 0:
            body[place : place + 1] = bytes([byte])
        case 1:
            body[place : place + 1] = bytes(old ^ (1 << byte % 8) for old in body[place : place + 1])
        case 2:
            body.insert(place, byte)
        case 3:
            del body[place : place + 1 + byte % 64]
        case 4:
            body[place:place] = body[place : place + 1 + byte % 64]
