"""What nodes and the coordinator say to each other, as typed structs, and the one way they become bytes.

A message is a MessagePack map with its kind under "type". It travels as the single buffer of an endpoint
message whose tag is `CONTROL_TAG`, always urgent; so a receiver tells control from bulk by the tag alone,
and allocates at most `MAX_BODY_BYTES` for it. Everything that arrives is bounded and checked here: what the
machines see is well typed, though not yet right. What may be said when is in `run` (coordinator) and
`member` (node).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgpack
import msgspec

from netem.changes import Change
from netem.errors import ProtocolError
from netem.schedule import Timed

PROTOCOL_VERSION = 2
COORDINATOR = "coordinator"  # the coordinator's name as an endpoint; no node may bear it
RUN_ID = "isthmus"  # of all endpoints of all runs, so that who asks at another run's coordinator is heard, and told
NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
CONTROL_TAG: bytes = msgpack.packb({"control": 1})
MAX_BODY_BYTES = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Name = Annotated[str, msgspec.Meta(pattern=NODE_NAME)]
Peer = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(~[0-9a-f]{1,32})?$")]
Reason = Annotated[str, msgspec.Meta(max_length=4000)]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=96)]
Digest = Annotated[str, msgspec.Meta(max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag=str.lower):
    """Base of all messages; the tag is the class's name in lower case."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """I live. Says nothing about progress. Both directions."""


# From a node to the coordinator.


class Join(Message, frozen=True, kw_only=True):
    """Let me in. `rank` is a wish, −1 for none; `config_digest` covers what all nodes must have in common.

    `name` is the part for people of the name that the sender's endpoint bears (`netem.names`).
    """

    name: Name
    token: Text
    version: Count
    run: Text
    config_digest: Digest
    address: Address
    host: Text = ""
    pid: Count = 0
    rank: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] = -1


class Ready(Message, frozen=True, kw_only=True):
    """I have done `step` steps and wait for the next.

    `metrics` are of the step just done; equal keys of `digests` must have equal values on all nodes.
    """

    step: Count
    metrics: Annotated[dict[Key, float], msgspec.Meta(max_length=1024)] = {}
    digests: Annotated[dict[Key, Digest], msgspec.Meta(max_length=64)] = {}


class Vote(Message, frozen=True, kw_only=True):
    """The round's bytes have (or have not) been exchanged here; `digest` is of the result."""

    round_id: Count
    ok: bool
    digest: Digest = ""
    reason: Reason = ""


class Saved(Message, frozen=True, kw_only=True):
    """My part of the checkpoint after `step` steps is on disk."""

    step: Count


class Changed(Message, frozen=True, kw_only=True):
    """The network's live change `number` is known here, and happens at its time."""

    number: Count


class Leave(Message, frozen=True, kw_only=True):
    """I go, in good order."""

    reason: Reason = ""


class Failed(Message, frozen=True, kw_only=True):
    """I cannot go on."""

    reason: Reason


# From a person (`operator`) to the coordinator, and back. Neither is about membership.


class Ask(Message, frozen=True, kw_only=True):
    """Change the run's network so, or without `change`: what is it like? `token` as in `Join`."""

    token: Text
    version: Count
    change: Change | None = None


class Answer(Message, frozen=True, kw_only=True):
    """The network at `step`, `at_s` emulated seconds after the run's start; who knows of the change, who is silent.

    `past` are the last changes that have happened, `coming` the next ones; both for people.
    """

    step: Count
    at_s: float
    network: Text
    past: Annotated[list[Text], msgspec.Meta(max_length=100)] = []
    coming: Annotated[list[Text], msgspec.Meta(max_length=100)] = []
    confirmed: Annotated[list[Name], msgspec.Meta(max_length=4096)] = []
    silent: Annotated[list[Name], msgspec.Meta(max_length=4096)] = []


# From the coordinator to a node.


class Welcome(Message, frozen=True, kw_only=True):
    """You are in; wait for the roster. `rank` is the granted wish, or −1 until the roster says it."""

    rank: Annotated[int, msgspec.Meta(ge=-1)]
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0)]
    heartbeat_timeout_s: Annotated[float, msgspec.Meta(gt=0)]


class Refused(Message, frozen=True, kw_only=True):
    """You are not in, and why. `address` repeats the joiner's, to tell two nodes of one name apart."""

    reason: Reason
    address: Annotated[str, msgspec.Meta(max_length=256)] = ""


class RosterEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One member as all others see it; `address` is where it listens, `peer` what its endpoint is called there."""

    name: Name
    peer: Peer
    rank: Count
    address: Address


class Roster(Message, frozen=True, kw_only=True):
    """The world is complete: members by rank, and the chunks of each rank.

    `start_step` steps are done already: each node goes on from its own part of that checkpoint.
    """

    generation: Count
    start_step: Count = 0
    members: Annotated[list[RosterEntry], msgspec.Meta(min_length=1, max_length=4096)]
    assignment: Annotated[list[list[Count]], msgspec.Meta(min_length=1, max_length=4096)]


class Round(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An averaging round at the end of a step: what is averaged (`kind`, opaque here), weights by rank."""

    round_id: Count
    kind: Key
    weights: Annotated[list[float], msgspec.Meta(max_length=4096)]


class Go(Message, frozen=True, kw_only=True):
    """All are ready: do `step` on the contexts from `cursor` on, then these rounds in this order."""

    step: Count
    generation: Count
    cursor: Count
    rounds: Annotated[list[Round], msgspec.Meta(max_length=64)] = []


class Alter(Message, frozen=True, kw_only=True):
    """The network changes, for the `number`-th time by command (from 1 on), at that time of its schedule."""

    number: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
    timed: Timed


class Commit(Message, frozen=True, kw_only=True):
    """All members have the round's result, and the same one: apply it."""

    round_id: Count


class Abort(Message, frozen=True, kw_only=True):
    """The round did not happen anywhere: discard its result."""

    round_id: Count
    reason: Reason


class Stop(Message, frozen=True, kw_only=True):
    """The run is over: done (`ok`), or ended for `reason`."""

    ok: bool
    reason: Reason = ""


NodeMessage = Join | Ready | Vote | Saved | Changed | Leave | Failed | Heartbeat | Ask
CoordinatorMessage = Welcome | Refused | Roster | Go | Alter | Commit | Abort | Stop | Heartbeat | Answer

Send = Callable[[bytes], None]


def encode(message: NodeMessage | CoordinatorMessage) -> bytes:
    """The body of a control message. Raises `ValueError` over the cap: our own fault, not a peer's."""
    body: bytes = msgpack.packb(msgspec.to_builtins(message))
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
    return body


def decode_from_node(body: bytes | bytearray | memoryview, peer: str = "") -> NodeMessage:
    """Read what a node sent. Raises `ProtocolError` naming `peer` and the field that is wrong."""
    message: NodeMessage = _decode(body, NodeMessage, peer)
    return message


def decode_from_coordinator(body: bytes | bytearray | memoryview, peer: str = COORDINATOR) -> CoordinatorMessage:
    """Read what the coordinator sent. Raises `ProtocolError` naming the field that is wrong."""
    message: CoordinatorMessage = _decode(body, CoordinatorMessage, peer)
    return message


def control_buffer(tag: bytes, total_bytes: int, peer: str) -> memoryview | None:
    """What a receiver's `admit` does about control: None where `tag` is not control, else room for the body.

    Raises `ProtocolError` where the body is empty or over the cap; nothing has been allocated then.
    """
    if tag != CONTROL_TAG:
        return None
    if not 0 < total_bytes <= MAX_BODY_BYTES:
        wanted = f"expected 1 to {MAX_BODY_BYTES}"
        raise ProtocolError(f"a control message of {total_bytes} bytes, {wanted}", peer=peer)
    return memoryview(bytearray(total_bytes))


def shorten(reason: str) -> str:
    """Fit any text into a `Reason`."""
    return reason if len(reason) <= 4000 else reason[:3996] + " ..."


def _decode(body: bytes | bytearray | memoryview, kinds: Any, peer: str) -> Any:
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"a control message of {len(body)} bytes exceeds {MAX_BODY_BYTES}", peer=peer)
    try:
        tree = msgpack.unpackb(body)
        return msgspec.convert(tree, kinds, strict=True)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a control message that does not fit: {error}", peer=peer) from None
    except (ValueError, msgpack.UnpackException) as error:
        what = str(error) or type(error).__name__
        raise ProtocolError(f"a control message that is not MessagePack: {what}", peer=peer) from None
