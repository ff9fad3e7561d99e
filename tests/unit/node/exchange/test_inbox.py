"""The inbox: what it refuses, before a byte is allocated; what it holds, and how waits end."""

from __future__ import annotations

import msgspec
import pytest
from helpers.inboxes import (
    FORMAT,
    FULL,
    ME,
    NAMES,
    RING_CAP_BYTES,
    SPEC,
    WORLD,
    Talk,
    admit,
    arrive,
    make_inbox,
    size,
    tag,
    waiting,
)
from helpers.worlds import tiny_config

from coordinator.assignment import Assignment
from coordinator.messages import CONTROL_TAG
from netem.errors import GenerationOver, PeerLate, PeerSilent, ProtocolError, RunAborted
from node.exchange import pieces as module
from node.exchange.formats import FORMATS
from node.exchange.inbox import Inbox, Members
from node.exchange.keys import ChunkKey, RingKey
from node.exchange.passes import PassSpec
from node.exchange.tags import ChunkTag, RingTag, Tag, encode_tag
from node.train.from_config import payload_format


@pytest.mark.parametrize(
    ("peer", "named"),
    [
        ("ann", tag("kv", 0)),
        ("cyd", tag("kv", 2)),
        ("cyd", tag("grad", 1)),
        ("cyd", tag("done", 1)),
        ("ann", tag("kv", 0, layer=2)),
        ("ann", tag("kv", 0, tokens=4, compressed=False)),
        ("ann", tag("kv", 0, pass_no=FULL + 2)),
    ],
    ids=str,
)
def test_what_is_owed_is_admitted_at_its_size(peer: str, named: ChunkTag) -> None:
    inbox = make_inbox()
    room = admit(inbox, peer, named)
    assert room is not None
    assert (len(room), room.readonly) == (size(named), False)
    inbox.deliver(peer, 1, encode_tag(named), room)
    key = ChunkKey(named.kind, named.pass_no, named.layer, named.chunk, NAMES.index(peer))
    assert inbox.take(key, 0) is room


REFUSED: list[tuple[str, str, Tag, int | None, str]] = [
    ("another's chunk", "cyd", tag("kv", 0), None, "cyd: sent kv of chunk 0, which it does not owe this node"),
    ("our own chunk", "ann", tag("kv", 1), None, "does not owe"),
    ("a chunk after all of ours", "cyd", tag("kv", 3), None, "does not owe"),
    ("a gradient of the reader's own", "cyd", tag("grad", 2), None, "does not owe"),
    ("a gradient of a chunk that the peer does not read", "ann", tag("grad", 1), None, "does not owe"),
    ("a gradient of our last chunk, which none reads", "cyd", tag("grad", 3), None, "does not owe"),
    ("done with a chunk that the peer does not read", "ann", tag("done", 1), None, "does not owe"),
    ("no such chunk", "ann", tag("kv", 4), None, "chunk 4, layer 0: this model has no such chunk or layer"),
    (
        "no such layer",
        "ann",
        ChunkTag("kv", FULL, 3, 0, 8, True, "float32", ()),
        0,
        "layer 3: this model has no such chunk or layer",
    ),
    ("a pass too far ahead", "ann", tag(pass_no=FULL + 3), None, "is at pass 8, this node at 5"),
    ("a length that no pass has", "ann", ChunkTag("kv", FULL, 0, 0, 6, True, "float32", ()), 0, "chunks of 6 tokens"),
    (
        "a pass that is both short and compressed",
        "ann",
        ChunkTag("kv", FULL, 0, 0, 4, True, "float32", ()),
        0,
        "compressed=True: unexpected",
    ),
    ("other shapes", "ann", tag(shapes=((2, 8, 3), (2, 1), (2, 8, 7), (2, 1))), None, "expected"),
    ("fewer tensors", "ann", tag(shapes=((2, 8, 3),)), None, "expected"),
    (
        "shapes that only multiply to the same",
        "ann",
        tag(shapes=((8, 2, 3), (2, 1), (2, 8, 6), (2, 1))),
        None,
        "expected",
    ),
    ("too many bytes", "ann", tag(), size(tag()) + 1, "bytes, expected"),
    ("too few bytes", "ann", tag(), size(tag()) - 1, "bytes, expected"),
    ("bytes behind done", "cyd", tag("done", 1), 4, "bytes, expected"),
    ("another number format", "ann", tag(format="bfloat16"), None, "numbers in bfloat16, expected float32"),
    ("a shard of the next in the ring", "cyd", RingTag(0, 0, 0), 8, "not the node before this one in the ring"),
    ("an empty shard", "ann", RingTag(0, 0, 0), 0, "a ring shard of 0 bytes"),
    ("a shard too large", "ann", RingTag(0, 0, 0), (16 << 20) + 1, "a ring shard of 16777217 bytes"),
    (
        "more shards than there is room for",
        "ann",
        RingTag(0, 0, 0),
        RING_CAP_BYTES + 1,
        "more than 1000 bytes of ring shards",
    ),
]


@pytest.mark.parametrize(
    ("peer", "named", "total_bytes", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_nonsense_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, peer: str, named: Tag, total_bytes: int | None, message: str
) -> None:
    inbox = make_inbox()
    monkeypatch.setattr(module.np, "empty", lambda *_: pytest.fail("allocated before it was validated"))
    with pytest.raises(ProtocolError, match=message) as caught:
        admit(inbox, peer, named, total_bytes)
    assert caught.value.peer == peer


def test_bytes_that_are_no_tag_are_refused() -> None:
    with pytest.raises(ProtocolError, match="ann: a tensor came with a malformed tag"):
        make_inbox().admit("ann", 1, b"\xc1", 8)


def test_nothing_is_admitted_before_the_roster() -> None:
    assert admit(Inbox(FORMAT, RING_CAP_BYTES), "ann", tag()) is None


def test_who_is_no_member_is_dropped_and_ends_nothing() -> None:
    inbox, talk = make_inbox(), Talk()
    inbox.follow(talk)
    for nonsense in (encode_tag(tag()), encode_tag(RingTag(0, 0, 0)), CONTROL_TAG, b"\xc1"):
        assert inbox.admit("eve", 1, nonsense, 8) is None
    inbox.failed(ProtocolError("nonsense", peer="eve"))
    inbox.failed(PeerSilent("eve", 30.0))
    assert talk.failures == []
    arrive(inbox, "ann", tag())
    inbox.take(ChunkKey("kv", FULL, 0, 0, 0), 0)


def test_a_new_generation_begins_with_nothing_held_and_hears_its_own_members_alone() -> None:
    inbox = make_inbox()
    late = admit(inbox, "ann", tag())
    assert late is not None
    arrive(inbox, "cyd", tag(chunk=2))
    arrive(inbox, "ann", RingTag(7, 0, 0), RING_CAP_BYTES)
    inbox.enter(Members(2, Assignment([[0], [1, 2, 3]]), 1, ("cyd", "bob")))
    inbox.deliver("ann", 1, encode_tag(tag()), late)  # was under way
    assert not inbox._held
    for key in (ChunkKey("kv", FULL, 0, 0, 0), RingKey(7, 0, 0)):
        with pytest.raises(PeerLate, match=r"waited 0 s"):
            inbox.take(key, 0)
    first = tag(pass_no=1)
    for peer, generation in (("ann", 2), ("cyd", 1), ("cyd", 3)):
        assert inbox.admit(peer, generation, encode_tag(first), size(first)) is None
    assert inbox.admit("cyd", 2, encode_tag(first), size(first)) is not None  # passes are counted anew
    assert inbox.admit("cyd", 2, encode_tag(RingTag(7, 0, 0)), RING_CAP_BYTES) is not None  # so is what waits


def test_a_pass_that_was_abandoned_in_an_older_generation_ends_none_of_this_one() -> None:
    """Its handle may be noticed late: it bears a number that the new world has given anew."""
    inbox = make_inbox()
    inbox.enter(Members(2, WORLD, ME, NAMES))
    inbox.begin(FULL)
    room = inbox.admit("ann", 2, encode_tag(tag()), size(tag()))
    assert room is not None
    inbox.deliver("ann", 2, encode_tag(tag()), room)
    inbox.end(FULL, 1)
    inbox.take(ChunkKey("kv", FULL, 0, 0, 0), 0)


def test_waits_end_when_a_later_generation_is_announced_and_not_in_that_one() -> None:
    inbox, talk = make_inbox(), Talk()
    inbox.follow(talk)
    talk.announce(1)  # the one that this node is in
    with pytest.raises(PeerLate, match=r"waited 0 s"):
        inbox.take(RingKey(0, 0, 0), 0)
    thread, raised = waiting(lambda: inbox.first_of([ChunkKey("kv", FULL, 0, 0, 0)], 60))
    talk.announce(2)
    thread.join(10)
    assert [type(error) for error in raised] == [GenerationOver]
    for late in (lambda: inbox.take(RingKey(0, 0, 0), 60), inbox.raise_if_over):
        with pytest.raises(GenerationOver, match="generation 1 is over: 2 has begun"):
            late()
    talk.announce(3)  # before this node has entered 2
    inbox.enter(Members(2, WORLD, ME, NAMES))
    with pytest.raises(GenerationOver, match="generation 2 is over: 3 has begun"):
        inbox.take(RingKey(0, 0, 0), 60)
    inbox.enter(Members(3, WORLD, ME, NAMES))
    inbox.raise_if_over()
    talk.abort("node-3 is lost")
    inbox.enter(Members(4, WORLD, ME, NAMES))
    with pytest.raises(RunAborted, match="node-3 is lost"):
        inbox.take(RingKey(0, 0, 0), 60)


def test_the_members_are_called_by_their_plain_names() -> None:
    inbox = Inbox(FORMAT, RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, ("ann~1", "bob~2", "cyd~3")))
    inbox.begin(FULL)
    with pytest.raises(ProtocolError, match=r"^ann: a tensor came with a malformed tag"):
        inbox.admit("ann~1", 1, b"\xc1", 8)
    with pytest.raises(PeerLate, match=r"layer 2 from ann: coordinator\.step_timeout_s"):
        inbox.take(ChunkKey("kv", FULL, 2, 0, 0), 0)
    with pytest.raises(PeerLate, match="hop 3 of averaging round 7 from ann:"):
        inbox.take(RingKey(7, 3, 0), 0)


def test_the_same_payload_twice_is_refused_while_it_is_held_and_after_it_was_taken() -> None:
    inbox = make_inbox()
    arrive(inbox, "ann", tag())
    message = "ann: the keys and values of chunk 0, layer 0 from ann came twice"
    with pytest.raises(ProtocolError, match=message):
        admit(inbox, "ann", tag())
    inbox.take(ChunkKey("kv", FULL, 0, 0, 0), 0)
    with pytest.raises(ProtocolError, match=message):
        admit(inbox, "ann", tag())
    inbox.begin(FULL + 1)
    arrive(inbox, "ann", tag(pass_no=FULL + 1))


def test_what_comes_too_late_is_dropped() -> None:
    """That is no error: the pass may have been given up here."""
    assert admit(make_inbox(), "ann", tag(pass_no=FULL - 1)) is None


def test_a_layer_sends_only_what_its_mode_has() -> None:
    """No theta where none is handed on, and no keys and values of a layer that sees its own chunk alone."""
    with pytest.raises(ProtocolError, match="ann: sent theta, which layer 0 does not send in this pass"):
        admit(make_inbox(), "ann", tag("theta"))
    inbox = Inbox(payload_format(tiny_config(compress={"remote_last_layers": 2})), RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, NAMES))
    inbox.begin(FULL)
    arrive(inbox, "ann", tag(layer=1))
    with pytest.raises(ProtocolError, match="ann: sent kv, which layer 0 does not send in this pass"):
        admit(inbox, "ann", tag(layer=0))


def test_a_pass_that_has_ended_is_forgotten_and_those_in_flight_are_not() -> None:
    inbox = make_inbox()
    for pass_no in (FULL, FULL + 1, FULL + 2):
        arrive(inbox, "ann", tag(pass_no=pass_no))
    for pass_no in (FULL + 1, FULL + 2):
        inbox.begin(pass_no)
    inbox.end(FULL + 1, 1)
    with pytest.raises(PeerLate, match="waited"):
        inbox.take(ChunkKey("kv", FULL + 1, 0, 0, 0), 0)
    assert admit(inbox, "ann", tag(pass_no=FULL + 1)) is None
    for pass_no in (FULL, FULL + 2):
        inbox.take(ChunkKey("kv", pass_no, 0, 0, 0), 0)


def test_what_was_coming_in_when_its_pass_ended_is_not_kept() -> None:
    inbox = make_inbox()
    room = admit(inbox, "ann", tag())
    assert room is not None
    inbox.end(FULL, 1)
    inbox.deliver("ann", 1, encode_tag(tag()), room)
    assert inbox._held == {}


def test_a_peer_may_be_as_many_passes_ahead_as_may_be_in_flight() -> None:
    """Four passes in flight: a peer that has begun them all may be four ahead of a node that has begun none of them."""
    for depth, admitted in ((1, 2), (2, 2), (4, 4)):
        config = tiny_config(train={"batch": 2 * depth, "micro_batches": depth})
        inbox = Inbox(payload_format(config), RING_CAP_BYTES)
        inbox.enter(Members(1, WORLD, ME, NAMES))
        inbox.begin(FULL)
        inbox.end(FULL, 1)
        for ahead in range(1, admitted + 1):
            arrive(inbox, "ann", tag(pass_no=FULL + ahead))
        with pytest.raises(ProtocolError, match=f"is at pass {FULL + admitted + 1}, this node at {FULL}"):
            admit(inbox, "ann", tag(pass_no=FULL + admitted + 1))


def test_shards_count_against_the_cap_until_they_are_taken() -> None:
    inbox = make_inbox()
    arrive(inbox, "ann", RingTag(7, 0, 0), 600)
    with pytest.raises(ProtocolError, match="more than 1000 bytes"):
        admit(inbox, "ann", RingTag(7, 1, 0), 600)
    with pytest.raises(ProtocolError, match="hop 0 of averaging round 7 from ann came twice"):
        admit(inbox, "ann", RingTag(7, 0, 0), 100)
    assert len(inbox.take(RingKey(7, 0, 0), 0)) == 600
    arrive(inbox, "ann", RingTag(7, 1, 0), 1000)


def test_the_first_in_order_of_what_has_come() -> None:
    inbox = make_inbox()
    keys = [ChunkKey("kv", FULL, 0, 0, 0), ChunkKey("kv", FULL, 0, 2, 2)]
    arrive(inbox, "cyd", tag("kv", 2))
    assert inbox.first_of(keys, 0) == keys[1]
    arrive(inbox, "ann", tag("kv", 0))
    assert inbox.first_of(keys, 0) == keys[0]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            ChunkKey("kv", 5, 2, 0, 0),
            "waited 0 s for the keys and values of chunk 0, layer 2 from ann: coordinator.step_timeout_s",
        ),
        (ChunkKey("grad", 5, 1, 1, 2), "waited 0 s for the gradient of chunk 1, layer 1 from cyd"),
        (ChunkKey("done", 5, 0, 1, 2), "waited 0 s for the acknowledgement of chunk 1, layer 0 from cyd"),
        (RingKey(7, 3, 0), "waited 0 s for hop 3 of averaging round 7 from ann"),
    ],
)
def test_a_deadline_names_what_did_not_come_and_from_whom(key: ChunkKey | RingKey, message: str) -> None:
    inbox = make_inbox()
    with pytest.raises(PeerLate, match=message) as caught:
        inbox.take(key, 0)
    assert caught.value.peer in message
    with pytest.raises(PeerLate, match=message):
        inbox.first_of([key], 0)


@pytest.mark.parametrize("kind", ["take", "first_of"])
def test_an_abort_wakes_every_wait_and_stays(kind: str) -> None:
    inbox, key = make_inbox(), ChunkKey("kv", FULL, 0, 0, 0)
    thread, raised = waiting(lambda: inbox.take(key, 60) if kind == "take" else inbox.first_of([key], 60))
    inbox.abort(RunAborted("cyd is lost"))
    inbox.abort(RunAborted("so is ann"))
    thread.join(10)
    assert [str(error) for error in raised] == ["cyd is lost"]
    with pytest.raises(RunAborted, match="cyd is lost"):
        inbox.take(RingKey(0, 0, 0), 60)


def test_an_arrival_wakes_a_wait() -> None:
    inbox = make_inbox()
    thread, raised = waiting(lambda: inbox.take(ChunkKey("kv", FULL, 0, 0, 0), 60))
    arrive(inbox, "ann", tag())
    thread.join(10)
    assert not thread.is_alive()
    assert not raised


@pytest.mark.parametrize("name", FORMATS)
def test_each_payload_is_admitted_in_its_own_format_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Compressed layers in the one, those sent whole in the other: what the tag says is checked, and its shapes."""
    whole = "int8" if name == "float32" else "float32"
    sized = (
        {"subspace": "learned", "rotation": "fixed", "centred": True, "whitened": True, "grad_format": "int4"}
        if name == "unit4"
        else {}
    )
    payload = payload_format(tiny_config(compress={"format": name, "dense_format": whole} | sized))
    inbox = Inbox(payload, RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, NAMES))
    inbox.begin(FULL)
    cases = ((0, SPEC, name), (2, SPEC, whole), (0, PassSpec(4, False), whole))
    for pass_no, (layer, spec, wanted) in enumerate(cases, FULL):
        shapes, total_bytes = tuple(t.shape for t in payload.tensors(layer, spec)), payload.chunk_bytes(layer, spec)
        right = ChunkTag("kv", pass_no, layer, 0, *spec, wanted, shapes)  # type: ignore[arg-type]
        wrong = [(msgspec.structs.replace(right, format=other), other) for other in FORMATS if other != wanted]
        wrong.append((msgspec.structs.replace(right, shapes=shapes[1:]), "shapes"))
        with monkeypatch.context() as patched:
            patched.setattr(module.np, "empty", lambda *_: pytest.fail("allocated before it was validated"))
            for named, message in wrong:
                with pytest.raises(ProtocolError, match=message):
                    inbox.admit("ann", 1, encode_tag(named), total_bytes)
        room = inbox.admit("ann", 1, encode_tag(right), total_bytes)
        assert room is not None
        assert len(room) == total_bytes
