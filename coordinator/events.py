"""What the coordinator's machine takes in (events) and what it returns (actions): types without behaviour.

`run` is the machine. `server` turns what happens into events, and carries the actions out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from coordinator.messages import CoordinatorMessage, NodeMessage
from netem.schedule import Schedule

# Events.


class Received(NamedTuple):
    """A node sent a message. The time that goes in with it is the time of its arrival."""

    peer: str
    message: NodeMessage


class PeerLost(NamedTuple):
    """The transport has lost a node."""

    peer: str
    reason: str


class Faulted(NamedTuple):
    """A node that is alive broke the protocol; `reason` says how, and names the node."""

    peer: str
    reason: str


class Cancelled(NamedTuple):
    """Someone on this side ends the run: Ctrl-C, a full disk."""

    reason: str


class Tick(NamedTuple):
    """Time has passed. Every message that arrived before has been handled."""


Event = Received | PeerLost | Faulted | Cancelled | Tick


def subject_of(event: Event) -> tuple[str, NodeMessage | Event]:
    """The peer that the event is about ("" where it is about none), and its message, or the event itself."""
    if isinstance(event, Received):
        return event.peer, event.message
    return (event.peer if isinstance(event, PeerLost | Faulted) else ""), event


# Actions.


class Send(NamedTuple):
    """Send `message` to the node `peer`."""

    peer: str
    message: CoordinatorMessage


class Forget(NamedTuple):
    """The node `peer` is gone: drop what is queued for it."""

    peer: str


PER_LINK: Final = "link/"
"""A metric whose key begins with this ("link/node-1/missed_s") is about one link of one node. Such metrics are
recorded, and not added up over nodes."""

PER_LAYER: Final = "layer/"
"""The same of one layer of one node ("layer/3/exposed_forward_s")."""


REFUSED_CONNECTIONS, REFUSED_REQUESTS = "refused_connections", "refused_requests"
"""Metrics: connections closed at a door since the step before, of nodes and coordinator, and what the coordinator
refused to callers that are no members. They are there only where there were any."""


class NetworkChange(NamedTuple):
    """A change of the network in words, and its time in seconds since the run's start."""

    at_s: float
    text: str


class Record(NamedTuple):
    """What the nodes measured in the step that ended with `step` steps done, by node name and key, and how the network
    has changed since the step before. `refused` is what the coordinator has refused since then, by key."""

    step: int
    generation: int
    nodes: Mapping[str, Mapping[str, float]]
    changes: Sequence[NetworkChange] = ()
    refused: Mapping[str, float] = MappingProxyType({})


class Follow(NamedTuple):
    """From now on the links from here follow `schedule`, whose time 0 is `began_s` of the machine's clock."""

    schedule: Schedule
    began_s: float


class CheckpointComplete(NamedTuple):
    """Every one of `nodes` members has its part of the checkpoint after `step` steps on disk."""

    step: int
    nodes: int


LOST, LEFT, FAILED, EVICTED, DISAGREED, SLOW = "lost", "left", "failed", "evicted", "disagreed", "slow"
DISK = "disk"
"""The kinds of `Fault`."""
JOINED, RECOVERED = "joined", "recovered"
"""A node that joins, or is slow no more, is no fault, but is told in the same way."""
GOOD_NEWS = (JOINED, RECOVERED)


class Fault(NamedTuple):
    """Something has changed the membership or has cost a step, and what was done about it.

    It ended `generation`, in which `step` steps counted, and had gone on unseen for `unseen_s` seconds. `done` says in
    words how the run went on, `cost_s` seconds later. Changes of the last `lost_steps` steps, which only the lost nodes
    had, are lost.
    """

    kind: str
    nodes: tuple[str, ...]
    reason: str
    step: int
    generation: int
    unseen_s: float
    lost_steps: int = 0
    done: str = ""
    cost_s: float = 0.0

    def __str__(self) -> str:
        """For a log: ``after step 7: node-1 was lost: silent for 15 s; generation 5 has …; cost 0.4 s``."""
        lost = f"; its changes of {self.lost_steps} steps are lost" if self.lost_steps else ""
        return f"after step {self.step}: {self.reason}; {self.done}{lost}; cost {self.cost_s:.1f} s"


class Say(NamedTuple):
    """Something that a person who reads the coordinator's log should know at once."""

    text: str


class CheckpointFailed(NamedTuple):
    """There is no checkpoint after `step` steps: the node that `reason` names could not write its part."""

    step: int
    reason: str


class Finish(NamedTuple):
    """The run is over. This is the last action."""

    ok: bool
    reason: str


Action = Send | Forget | Follow | Record | CheckpointComplete | CheckpointFailed | Fault | Say | Finish
