"""What the coordinator's machine takes in (events) and gives out (actions): a vocabulary without behaviour.

`run` is the machine; `server` makes the events of what happens and does what the actions say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from coordinator.messages import CoordinatorMessage, NodeMessage
from netem.schedule import Schedule

# Events.


class Received(NamedTuple):
    """A node said something. The time given with it is that of its arrival."""

    peer: str
    message: NodeMessage


class PeerLost(NamedTuple):
    """The transport gave a node up."""

    peer: str
    reason: str


class Faulted(NamedTuple):
    """A node that lives broke the protocol; `reason` names it."""

    peer: str
    reason: str


class Cancelled(NamedTuple):
    """Someone on this side ends the run: Ctrl-C, a full disk."""

    reason: str


class Tick(NamedTuple):
    """Time has passed. All that arrived before has been handled."""


Event = Received | PeerLost | Faulted | Cancelled | Tick

# Actions.


class Send(NamedTuple):
    """Say `message` to the node `peer`."""

    peer: str
    message: CoordinatorMessage


class Forget(NamedTuple):
    """The node `peer` is gone: drop what is queued for it."""

    peer: str


PER_LINK: Final = "link/"
"""Keys that begin so ("link/node-1/missed_s") are of one link of one node. They are recorded, and not added up."""


class NetworkChange(NamedTuple):
    """What changed in the network, for people, and when: seconds since the run's start."""

    at_s: float
    text: str


class Record(NamedTuple):
    """What the nodes measured, after `step` steps, by node name and key; how the network has changed since the step
    before."""

    step: int
    generation: int
    nodes: Mapping[str, Mapping[str, float]]
    changes: Sequence[NetworkChange] = ()


class Follow(NamedTuple):
    """The network from here goes by `schedule` from now on, which began at `began_s` of the machine's clock."""

    schedule: Schedule
    began_s: float


class CheckpointComplete(NamedTuple):
    """Every node has its part of the checkpoint after `step` steps on disk."""

    step: int


class Finish(NamedTuple):
    """The last action: all is said."""

    ok: bool
    reason: str


Action = Send | Forget | Follow | Record | CheckpointComplete | Finish
