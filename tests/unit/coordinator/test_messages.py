"""What is said comes back equal; nonsense is a protocol error that names the peer, and nothing else."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.messages import (
    CONTROL_TAG,
    MAX_BODY_BYTES,
    PROTOCOL_VERSION,
    Alter,
    Answer,
    Ask,
    Changed,
    Commit,
    CoordinatorMessage,
    Evicted,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    RosterEntry,
    Round,
    Saved,
    Stop,
    Suspect,
    Vote,
    Welcome,
    control_buffer,
    decode_from_coordinator,
    decode_from_node,
    encode,
    shorten,
)
from netem.changes import Cut, Heal, Tune
from netem.errors import ProtocolError
from netem.keys import new_pair
from netem.schedule import Timed

KEY = new_pair().public
JOIN = Join(name="node-0", key=KEY, version=1, run="r", config_digest="c", address="tcp://127.0.0.1:1", rank=2)


@pytest.mark.parametrize(
    "message",
    [
        JOIN,
        Ready(step=3, metrics={"loss": 1.5, "nan": float("inf")}, digests={"basis": "ab"}),
        Vote(round_id=1, ok=False, digest="d", reason="r"),
        Saved(step=3),
        Changed(number=2),
        Ask(version=PROTOCOL_VERSION, change=Cut(ends=("a", "b"))),
        Ask(version=PROTOCOL_VERSION, change=Tune(ends=("a",), has_rate=True, rate_bps=5e6, latency_s=0.0)),
        Ask(version=PROTOCOL_VERSION),
        Suspect(peer="node-1~0f", reason="waited 300 s", generation=3),
        Leave(),
        Failed(reason="θ out of range"),
        Heartbeat(),
    ],
)
def test_a_nodes_words_come_back_equal(message: NodeMessage) -> None:
    assert decode_from_node(memoryview(bytearray(encode(message)))) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(rank=-1, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0),
        Refused(reason="no", address="a"),
        Roster(generation=2, members=[RosterEntry(name="a", peer="a~0f", rank=0, address="x")], assignment=[[0, 1]]),
        Go(step=0, generation=2, cursor=5, rounds=[Round(round_id=0, kind="weights", weights=[1.0])]),
        Alter(number=1, timed=Timed(at_s=2.5, change=Heal())),
        Answer(step=3, at_s=2.5, network="home", past=["at 1 s all cuts healed"], confirmed=["a"], silent=["b"]),
        Commit(round_id=1),
        Pause(generation=4, reason="r"),
        Evicted(reason="r"),
        Stop(ok=True),
        Heartbeat(),
    ],
)
def test_the_coordinators_words_come_back_equal(message: CoordinatorMessage) -> None:
    assert decode_from_coordinator(encode(message)) == message


JOIN_TREE = msgpack.unpackb(encode(JOIN))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (JOIN_TREE | {"name": "a b"}, "name"),
        (JOIN_TREE | {"name": "x" * 65}, "name"),
        (JOIN_TREE | {"key": 5}, "key"),
        (JOIN_TREE | {"key": KEY[1:]}, "key"),
        (JOIN_TREE | {"rank": -2}, "rank"),
        (JOIN_TREE | {"surprise": 1}, "surprise"),
        ({k: v for k, v in JOIN_TREE.items() if k != "address"}, "address"),
        ({"type": "ready", "step": -1}, "step"),
        ({"type": "ready", "step": True}, "step"),
        ({"type": "ready", "step": 1, "metrics": {"a": "b"}}, "metrics"),
        ({"type": "ready", "step": 1, "metrics": {str(i): 1.0 for i in range(1025)}}, "metrics"),
        ({"type": "vote", "round_id": 1}, "ok"),
        ({"type": "go", "step": 1}, "go"),
        ({"type": "ask", "version": 2, "change": {"change": "cut", "ends": ["a"]}}, "ends"),
        ({"type": "ask", "version": 2, "change": {"change": "tune", "rate_bps": 0}}, "rate_bps"),
        ({"type": "ask", "version": 2, "change": {"change": "tune", "ends": ["x" * 65]}}, "ends"),
        ({"type": "nonsense"}, "nonsense"),
        ({"step": 1}, "type"),
        ([1, 2], "array"),
        (None, "null"),
    ],
)
def test_what_does_not_fit_names_the_field_and_the_peer(tree: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as caught:
        decode_from_node(msgpack.packb(tree), "node-3")
    assert caught.value.peer == "node-3"


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_protocol_error(body: bytes) -> None:
    try:
        decode_from_node(body, "x")
    except ProtocolError:
        return


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff", b"\x80\x80"])
def test_what_is_not_messagepack(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not MessagePack"):
        decode_from_node(body)


def test_a_body_over_the_cap_is_not_even_parsed() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        decode_from_node(bytes(MAX_BODY_BYTES + 1))
    with pytest.raises(ValueError, match="exceeds"):
        encode(Go(step=0, generation=0, cursor=0, rounds=[Round(round_id=0, kind="k" * MAX_BODY_BYTES, weights=[])]))


def test_the_receiver_makes_room_for_control_only_and_not_for_too_much() -> None:
    buffer = control_buffer(CONTROL_TAG, 10, "p")
    assert buffer is not None
    assert len(buffer) == 10
    assert control_buffer(b"bulk", 1 << 40, "p") is None
    for total_bytes in (0, MAX_BODY_BYTES + 1):
        with pytest.raises(ProtocolError, match="p: a control message"):
            control_buffer(CONTROL_TAG, total_bytes, "p")


def test_any_reason_fits_once_shortened() -> None:
    assert decode_from_node(encode(Failed(reason=shorten("ü" * 100_000))))
    assert shorten("short") == "short"
