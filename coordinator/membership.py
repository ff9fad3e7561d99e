"""The members of a run, from the first that joins: a small machine without I/O.

It decides which nodes may join, says why another may not, counts generations, and finds members that are silent. Ranks
are given when the roster is made: members get the ranks that they asked for, the rest follow in name order, so ranks do
not depend on the order of joining. It sends nothing; `run` does.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from coordinator.assignment import Assignment
from coordinator.config import CoordinatorConfig
from coordinator.messages import COORDINATOR, PROTOCOL_VERSION, Ask, Join, Peer, Roster, RosterEntry, Watch, Welcome
from netem.names import plain


@dataclass
class Seat:
    """One member: its `Join`, and when it was last heard (seconds of the caller's clock)."""

    join: Join
    heard_s: float


class Membership:
    """The members of one run, identified by the names of their endpoints, which are unique (`netem.names`).

    Members' plain names are unique too. `generation` rises whenever a node joins, leaves or is lost. It is 0 only
    before the first node joins: nodes that have no roster yet, and the coordinator itself, mark their messages with
    generation 0, which an endpoint never treats as out of date.
    """

    def __init__(self, config: CoordinatorConfig, run_name: str, config_digest: str) -> None:
        self._config = config
        self._run_name = run_name
        self._config_digest = config_digest
        self._relays = config.relays
        self._seats: dict[str, Seat] = {}
        self.generation = 0

    def __contains__(self, peer: str) -> bool:
        return peer in self._seats

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def peers(self) -> list[str]:
        """Members in the order of their names, with numbers compared by value: node-2 before node-10."""
        return sorted(self._seats, key=lambda peer: name_order(plain(peer)))

    @property
    def names(self) -> list[str]:
        """The plain names of the members, in the same order."""
        return [plain(peer) for peer in self.peers]

    @property
    def complete(self) -> bool:
        """Whether all expected nodes have joined."""
        return len(self._seats) == self._config.nodes

    def refusal(self, peer: str, join: Join) -> str | None:
        """Why this node may not join, for a person to read; None where it may.

        A node without the token learns nothing about the run.
        """
        if (reason := self.refusal_to_talk(join.name, join)) is not None:
            return reason
        if not _is_peer(peer) or plain(peer) != join.name or join.name == COORDINATOR:
            return f"{join.name!r} is not a name that the endpoint {peer!r} may use"
        if join.run != self._run_name:
            return f"this is run {self._run_name!r}, {join.name} asks for run {join.run!r}; give all the same run.name"
        if join.config_digest != self._config_digest:
            return (
                f"the configuration of {join.name} differs from the coordinator's "
                f"({_short(join.config_digest)}, not {_short(self._config_digest)}); "
                "start all from the same file"
            )
        return self._clash(join)

    def refusal_to_talk(self, name: str, opening: Join | Ask | Watch) -> str | None:
        """Why the sender of this first message gets no further answer; None where it gets one."""
        if opening.version != PROTOCOL_VERSION:
            return (
                f"{name} speaks protocol version {opening.version}, this run version {PROTOCOL_VERSION}; "
                "install the same isthmus on all machines"
            )
        if not hmac.compare_digest(opening.token.encode(), self._config.token.encode()):
            mend = "set coordinator.token" if isinstance(opening, Join) else "give --token"
            return f"{name} does not have this run's token; {mend} as the coordinator has it"
        return None

    def admit(self, peer: str, join: Join, now_s: float) -> None:
        """Make a node a member. `refusal` must have returned None for it."""
        assert peer not in self._seats
        assert not self.complete
        self._seats[peer] = Seat(join, now_s)
        self.generation += 1

    def remove(self, peer: str) -> None:
        """Remove a member that left or was lost."""
        del self._seats[peer]
        self.generation += 1

    def hear(self, peer: str, now_s: float) -> None:
        """Note that a member was heard at `now_s`. A time before the latest one changes nothing."""
        seat = self._seats[peer]
        seat.heard_s = max(seat.heard_s, now_s)

    def silent(self, now_s: float) -> list[str]:
        """Members unheard for longer than the heartbeat timeout, in name order."""
        timeout_s = self._config.heartbeat_timeout_s
        return [peer for peer in self.peers if now_s - self._seats[peer].heard_s > timeout_s]

    def welcome(self, join: Join) -> Welcome:
        """The answer to a node that was admitted."""
        return Welcome(
            rank=join.rank,
            heartbeat_interval_s=self._config.heartbeat_interval_s,
            heartbeat_timeout_s=self._config.heartbeat_timeout_s,
        )

    def roster(self, start_step: int, assignment: Assignment) -> Roster:
        """This generation's members by rank, and their chunks.

        Members get the ranks that they asked for, where there are such ranks; the others fill the gaps in name order.
        """
        count = len(self._seats)
        assert assignment.n_ranks == count
        asked = {seat.join.rank: peer for peer, seat in self._seats.items() if 0 <= seat.join.rank < count}
        others = iter(peer for peer in self.peers if peer not in asked.values())
        order = [asked[rank] if rank in asked else next(others) for rank in range(count)]
        return Roster(
            generation=self.generation,
            start_step=start_step,
            members=[
                RosterEntry(name=plain(peer), peer=peer, rank=rank, address=join.address, cores=join.cores)
                for rank, peer in enumerate(order)
                for join in (self._seats[peer].join,)
            ],
            assignment=assignment.to_lists(),
            relays=self._relays,
        )

    def describe(self, peers: Sequence[str]) -> str:
        """Names, each with its process and host: ``node-2 (pid 71 on atlas)``."""
        return ", ".join(_describe(self._seats[peer].join) for peer in peers)

    def waiting_text(self) -> str:
        """How many nodes have joined: ``2 of 4 nodes joined: node-0, node-2; still waiting for 2 more``."""
        here = f": {', '.join(self.names)}" if self._seats else ""
        count = f"{len(self._seats)} of {self._config.nodes} nodes joined"
        return f"{count}{here}; still waiting for {self._missing()}"

    def _clash(self, join: Join) -> str | None:
        nodes = self._config.nodes
        members = [seat.join for seat in self._seats.values()]
        for member in members:
            if member.name == join.name:
                return (
                    f"a node named {join.name} is already here ({_describe(member)}); "
                    "give each node its own name, or wait until the old one is gone"
                )
        for member in members:
            if member.address == join.address:
                return f"{member.name} already listens at {join.address}; give {join.name} an address of its own"
            if member.rank == join.rank >= 0:
                return f"rank {join.rank} is taken by {member.name}; give {join.name} another rank, or none"
        if join.rank >= nodes:
            return f"rank {join.rank} is not in a world of {nodes}; ask for 0 to {nodes - 1}, or for none"
        if self.complete:
            return f"the run is full: it has its {nodes} nodes ({', '.join(self.names)})"
        return None

    def _missing(self) -> str:
        """The names of the missing nodes where all names are the usual ``node-0`` to ``node-N``, else their number."""
        usual = [f"node-{number}" for number in range(self._config.nodes)]
        if all(name in usual for name in self.names):
            return ", ".join(name for name in usual if name not in self.names)
        return f"{self._config.nodes - len(self._seats)} more"


def name_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which node-2 comes before node-10. Any two names can be compared."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts)


def _describe(join: Join) -> str:
    process = f"pid {join.pid}" if join.pid else ""
    where = f"on {join.host}" if join.host else ""
    detail = " ".join(part for part in (process, where) if part)
    return f"{join.name} ({detail})" if detail else join.name


def _is_peer(name: str) -> bool:
    try:
        msgspec.convert(name, Peer)
    except msgspec.ValidationError:
        return False
    return True


def _short(digest: str) -> str:
    return digest[:12] or "none"
