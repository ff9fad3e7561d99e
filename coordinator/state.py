"""What a coordinator must still know when it was killed and is started again: its small state. No I/O.

It is on disk (`coordinator.records.state_file`) before anything that follows from it is sent: a generation, a step that
counts, a round that has happened, a change of the network. So a coordinator that is started again knows all that any
node may have been told. It sends the last commit once more, for a node that has voted and not heard of it, and then
begins a new generation with the members that it had; those that are gone meanwhile are found silent.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from coordinator.messages import Join
from netem.errors import ConfigError
from netem.schedule import Timed

STATE_VERSION = 1

SEAT_BYTES = 2048
"""Room for one member in the file; a `Join` is shorter."""
BASE_BYTES = 1 << 20
"""Room for all else, above all for the network's changes."""

Count = Annotated[int, Meta(ge=0, le=1 << 53)]


class SavedSeat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One member: the name of its endpoint, its place, and its `Join`."""

    peer: str
    place: Annotated[int, Meta(ge=-1)]
    join: Join


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The run is ending: whether it has reached its last step, or why not."""

    ok: bool
    reason: str


class SavedState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's state. `tail` are the rounds that the last step still needs, `committed` is the last round that has
    happened, −1 for none. `members` are those of the newest generation, `lacking` those of them that may not have the
    weights yet, and `seats` also those who wait for the next. `gone` are former members that may not know it.
    The run began at `began_s`: on disk in seconds of Unix time, in the machine of its own clock. `address` is where the
    coordinator listens."""

    version: int = STATE_VERSION
    run: str
    config_digest: str
    address: str = ""
    start_step: Count
    generation: Count
    step: Count
    tail: list[str] | None = None
    next_round: Count
    committed: Annotated[int, Meta(ge=-1)] = -1
    members: list[str]
    lacking: list[str] = []
    gone: dict[str, str] = {}
    seats: list[SavedSeat]
    began_s: float
    changes: list[Timed] = []
    ending: Ending | None = None


def slot_bytes(nodes: int) -> int:
    """The room that the state of a run of so many nodes needs on the disk, twice."""
    return BASE_BYTES + SEAT_BYTES * nodes


def encode_state(state: SavedState) -> bytes:
    """The state as bytes."""
    return msgspec.msgpack.encode(state)


def decode_state(data: bytes, run: str, config_digest: str, where: str) -> SavedState:
    """Read a state back. `where` names the file. Raises `ConfigError` where it is of another version, run or config."""
    mend = f"start the coordinator as it was started before, or remove {where} to go on from a checkpoint"
    try:
        state = msgspec.msgpack.decode(data, type=SavedState)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where}: not the state of a coordinator of this version ({error}); {mend}") from None
    if state.version != STATE_VERSION:
        raise ConfigError(f"{where}: of version {state.version}, this isthmus has version {STATE_VERSION}; {mend}")
    for what, found, wanted in (("run", state.run, run), ("config", state.config_digest, config_digest)):
        if found != wanted:
            raise ConfigError(f"{where}: of the {what} {found[:64]!r}, this coordinator has {wanted[:64]!r}; {mend}")
    return state
