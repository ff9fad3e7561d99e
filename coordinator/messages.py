"""The messages between nodes and the coordinator, as typed structs, and their form as bytes.

A message is a MessagePack map with its kind under "type". It travels as the single buffer of an endpoint message whose
tag is `CONTROL_TAG`, and is always urgent. So a receiver tells control from bulk by the tag alone, and allocates at
most `MAX_BODY_BYTES` for it. The sizes and types of whatever arrives are checked here. Whether it may come now, and
whether its values are right, is for `run` (coordinator) and `member` (node) to decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgpack
import msgspec

from netem.changes import Change
from netem.errors import ProtocolError
from netem.names import KeyText
from netem.schedule import Timed

PROTOCOL_VERSION = 7
COORDINATOR = "coordinator"  # the coordinator's name as an endpoint; no node may bear it
RUN_ID = "isthmus"  # the same for all runs, so that a coordinator can tell a node that it has asked at the wrong run
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
    """The sender is alive. It says nothing about progress. Sent in both directions."""


# From a node to the coordinator.


class Join(Message, frozen=True, kw_only=True):
    """A request to join. `rank` is the rank that the node asks for, −1 for none.

    `config_digest` covers all settings that must be equal on all nodes. `name` is the plain part of the name of the
    sender's endpoint (`netem.names`), `key` its public key, and `encrypted` says whether its callers speak CURVE.
    `cores` names the CPU cores that it runs on (`netem.cores`), and `memory_bytes` is the memory of its device, 0 for
    unknown. Where a node is a site of several `processes`, `site` is its name, `local_rank` this process's place in it
    (`coordinator.layout`), and `rank` what the site asks for.
    """

    name: Name
    key: KeyText = ""
    encrypted: bool = False
    version: Count
    run: Text
    config_digest: Digest
    address: Address
    host: Text = ""
    pid: Count = 0
    cores: Text = ""
    memory_bytes: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    rank: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] = -1
    site: Annotated[str, msgspec.Meta(pattern=NODE_NAME + "|^$")] = ""
    local_rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    processes: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1
    preparing: bool = False
    """Whether it still prepares its data. No generation with it begins before it has asked again without this."""


class Ready(Message, frozen=True, kw_only=True):
    """The sender has taken `step` steps, or holds the last of them, and waits for the next.

    `generation` is that in which it says so, here and below; a message of an older one counts for nothing. `metrics`
    are those of the last step; equal keys of `digests` must have equal values on all nodes.
    """

    step: Count
    generation: Count = 0
    metrics: Annotated[dict[Key, float], msgspec.Meta(max_length=1024)] = {}
    digests: Annotated[dict[Key, Digest], msgspec.Meta(max_length=64)] = {}


class Vote(Message, frozen=True, kw_only=True):
    """Whether the sender has the round's result; `digest` is the digest of it."""

    round_id: Count
    ok: bool
    generation: Count = 0
    digest: Digest = ""
    reason: Reason = ""


class Saved(Message, frozen=True, kw_only=True):
    """The sender's part of the checkpoint after `step` steps is on disk, or is not, for `reason`."""

    step: Count
    reason: Reason = ""
    generation: Count = 0


class Suspect(Message, frozen=True, kw_only=True):
    """The sender waits in vain for the member `peer`, cannot reach it, or has got nonsense from it."""

    peer: Peer
    reason: Reason
    generation: Count = 0


class Changed(Message, frozen=True, kw_only=True):
    """The sender knows the live change `number` of the network, and makes it at its time."""

    number: Count


class Leave(Message, frozen=True, kw_only=True):
    """The sender leaves, in good order."""

    reason: Reason = ""


class Failed(Message, frozen=True, kw_only=True):
    """The sender cannot go on. With `ends_run` nobody should: its reason holds for all, such as a loss of NaN."""

    reason: Reason
    ends_run: bool = False


# From a person (`operator`) to the coordinator, and back. The person does not become a member.


class Ask(Message, frozen=True, kw_only=True):
    """A request to change the run's network, or, without `change`, to describe it."""

    version: Count
    change: Change | None = None


class Watch(Message, frozen=True, kw_only=True):
    """A request for what the run has recorded after the line of this number."""

    version: Count
    after: Count = 0


class Watched(Message, frozen=True, kw_only=True):
    """What the run has recorded: its `config` as TOML without secrets, lines of metrics.jsonl, the number of the last
    one, the seconds since the coordinator started, and in words where the run is."""

    config: Annotated[str, msgspec.Meta(max_length=1 << 16)]
    lines: Annotated[list[str], msgspec.Meta(max_length=1000)]
    number: Count
    elapsed_s: Annotated[float, msgspec.Meta(ge=0)]
    state: Text


class Answer(Message, frozen=True, kw_only=True):
    """The network at `step`, `at_s` emulated seconds after the run's start, and which nodes have confirmed the change.

    `past` describes the last changes that have happened, `coming` the next ones, both in words.
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
    """The node is let in and waits for a roster. `rank` repeats the rank that it asked for, or −1."""

    rank: Annotated[int, msgspec.Meta(ge=-1)]
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0)]
    heartbeat_timeout_s: Annotated[float, msgspec.Meta(gt=0)]


class Refused(Message, frozen=True, kw_only=True):
    """The node may not join, and why. `address` repeats its address, which tells two nodes of one name apart. Where it
    may ask again, it does so after `again_s` seconds; 0 stands for never."""

    reason: Reason
    address: Annotated[str, msgspec.Meta(max_length=256)] = ""
    again_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0


class RosterEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One member. It listens at `address`; `peer` is the name of its endpoint. `key` and `encrypted` as in `Join`.
    Members with the same `cores` share them. One that `joins` was no member before, in a run that goes on: it has not
    the weights after `start_step` steps, and gets them from one that has."""

    name: Name
    peer: Peer
    rank: Count
    address: Address
    cores: Text = ""
    joins: bool = False
    key: KeyText = ""
    encrypted: bool = False


class Roster(Message, frozen=True, kw_only=True):
    """A generation begins: its members by rank, the chunks of each rank, and whether keys and values are passed on.
    Where nodes are sites of several processes, the members are those of the receiver's column.

    All members have taken `start_step` steps: one that holds the last of them takes it, and whatever else was under way
    is dropped. In the first generation of a resumed run each goes on from its own part of that checkpoint. `elapsed_s`
    seconds have passed since the first roster of the run was sent. By `secret` members prove
    to each other, where they do not encrypt, that they are members.
    """

    generation: Count
    secret: Annotated[str, msgspec.Meta(max_length=128)] = ""
    start_step: Count = 0
    elapsed_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    members: Annotated[list[RosterEntry], msgspec.Meta(min_length=1, max_length=4096)]
    assignment: Annotated[list[list[Count]], msgspec.Meta(min_length=1, max_length=4096)]
    relays: bool = False


class Round(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An averaging round of a step. `kind` says what is averaged and is not interpreted here; weights are by rank."""

    round_id: Count
    kind: Key
    weights: Annotated[list[float], msgspec.Meta(max_length=4096)]


class Go(Message, frozen=True, kw_only=True):
    """All members are ready: do the step after `step` steps on the contexts from `cursor` on.

    The members vote on `rounds` during the step, in this order. `begins` are rounds whose data starts to travel as the
    step starts. They are among the `rounds` of a later step, or of this one.

    Every member takes the step that it holds from before. With `tail` no step is to be done: all have taken `step`
    steps, and what follows the last one of them was not finished by all; `rounds` are those that are left of it.
    Checkpoints before step `keep_from` may be removed.
    """

    step: Count
    generation: Count
    cursor: Count
    rounds: Annotated[list[Round], msgspec.Meta(max_length=64)] = []
    begins: Annotated[list[Round], msgspec.Meta(max_length=64)] = []
    tail: bool = False
    keep_from: Count = 0


class Alter(Message, frozen=True, kw_only=True):
    """The network will change, at the given time of its schedule. Changes by command are numbered from 1 on."""

    number: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
    timed: Timed


class Commit(Message, frozen=True, kw_only=True):
    """All members have the same result of the round, and apply it. Where a roster, a pause or the run's end comes
    first, the round has happened on no member. A coordinator that was started again says the last one `again`: a
    member that has heard it does nothing."""

    round_id: Count
    again: bool = False


class Pause(Message, frozen=True, kw_only=True):
    """The generation before `generation` is over, and no other one begins before there are enough nodes."""

    generation: Count
    reason: Reason


class Evicted(Message, frozen=True, kw_only=True):
    """The node is no member any more, and why. It may ask to join anew."""

    reason: Reason


class Stop(Message, frozen=True, kw_only=True):
    """The run is over: it reached its last step (`ok`), or it ended for `reason`."""

    ok: bool
    reason: Reason = ""


NodeMessage = Join | Ready | Vote | Saved | Suspect | Changed | Leave | Failed | Heartbeat | Ask | Watch
CoordinatorMessage = (
    Welcome | Refused | Roster | Go | Alter | Commit | Pause | Evicted | Stop | Heartbeat | Answer | Watched
)

Send = Callable[[bytes], None]


def encode(message: Message) -> bytes:
    """The body of a control message. Raises `ValueError` where it is too large, which is a fault on this side."""
    body: bytes = msgpack.packb(msgspec.to_builtins(message))
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
    return body


def decode_from_node(body: bytes | bytearray | memoryview, peer: str = "") -> NodeMessage:
    """Decode a message of a node. Raises `ProtocolError` naming `peer` and the field that is wrong."""
    message: NodeMessage = decode(body, NodeMessage, peer)
    return message


def decode_from_coordinator(body: bytes | bytearray | memoryview, peer: str = COORDINATOR) -> CoordinatorMessage:
    """Decode a message of the coordinator. Raises `ProtocolError` naming the field that is wrong."""
    message: CoordinatorMessage = decode(body, CoordinatorMessage, peer)
    return message


def control_buffer(tag: bytes, total_bytes: int, peer: str) -> memoryview | None:
    """For a receiver's `admit`: room for the body of a control message; None where `tag` is not that of control.

    Raises `ProtocolError`, before anything is allocated, where the body is empty or too large.
    """
    if tag != CONTROL_TAG:
        return None
    if not 0 < total_bytes <= MAX_BODY_BYTES:
        wanted = f"expected 1 to {MAX_BODY_BYTES}"
        raise ProtocolError(f"a control message of {total_bytes} bytes, {wanted}", peer=peer)
    return memoryview(bytearray(total_bytes))


def shorten(reason: str) -> str:
    """Cut any text to the length of a `Reason`."""
    return reason if len(reason) <= 4000 else reason[:3996] + " ..."


def decode(body: bytes | bytearray | memoryview, kinds: Any, peer: str) -> Any:
    """A message that must be one of `kinds`. Raises `ProtocolError` naming `peer` and the field that is wrong."""
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
