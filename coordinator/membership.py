"""The members of a run, from the first that joins: a small machine without I/O.

It decides which nodes may join, says why another may not, counts generations, and finds members that are silent. Who
joins a run that goes on is a guest until the next generation begins; `run` knows who is in which one. Each member has a
place, a number below the number of nodes that the run began with. When the first roster is made, members get the
places that they asked for, the rest follow in name order, so they do not depend on the order of joining; one that comes
later gets a free one. Ranks are in the order of places. It sends nothing; `run` does.

Where nodes are sites of several processes (`coordinator.layout`), each process is a member, and a site has one place.
It may take part once all of its processes are here, and leaves as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.holdoff import HoldOff
from coordinator.messages import COORDINATOR, PROTOCOL_VERSION, Ask, Join, Peer, RosterEntry, Watch, Welcome
from coordinator.state import SavedSeat
from netem.names import plain


@dataclass
class Seat:
    """One member: its `Join`, when it was last heard (seconds of the caller's clock), and its place, −1 for none."""

    join: Join
    heard_s: float
    place: int = -1

    @property
    def site(self) -> str:
        """The name of the member's site; a plain node is a site of its own."""
        return _site(self.join)


class Membership:
    """The members of one run, identified by the names of their endpoints, which are unique (`netem.names`).

    Members' plain names are unique too. `generation` rises whenever a node joins, leaves or is lost. It is 0 only
    before the first node joins: nodes that have no roster yet, and the coordinator itself, mark their messages with
    generation 0, which an endpoint never treats as out of date.
    """

    def __init__(self, config: CoordinatorConfig, run_name: str, config_digest: str) -> None:
        self._config = config
        self._layout = config.layout
        self._run_name = run_name
        self._config_digest = config_digest
        self._seats: dict[str, Seat] = {}
        self._holdoff = HoldOff(config.heartbeat_timeout_s)
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
    def full(self) -> bool:
        """Whether all expected nodes have joined."""
        return len(self._seats) == self._layout.processes

    def mates(self, peers: Iterable[str]) -> list[str]:
        """All members of these members' sites, themselves among them, in name order."""
        sites = {self._seats[peer].site for peer in peers}
        return [peer for peer in self.peers if self._seats[peer].site in sites]

    def is_whole(self, peer: str) -> bool:
        """Whether all processes of this member's site are here, and have their data."""
        mates = self.mates([peer])
        return len(mates) == self._layout.columns and not any(map(self.is_preparing, mates))

    @property
    def complete(self) -> bool:
        """Whether all have joined, and have their data."""
        return self.full and not any(map(self.is_preparing, self._seats))

    def is_preparing(self, peer: str) -> bool:
        """Whether a member still prepares its data."""
        return self._seats[peer].join.preparing

    def refusal(self, peer: str, join: Join) -> str | None:
        """Why this node may not join, for a person to read; None where it may, or has joined.

        Nodes that do not have the run's token or an invitation do not come this far (`doorkeeper`).
        """
        if peer in self._seats:
            return None
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

    @staticmethod
    def refusal_to_talk(name: str, opening: Join | Ask | Watch) -> str | None:
        """Why the sender of this first message gets no further answer; None where it gets one."""
        if opening.version != PROTOCOL_VERSION:
            return (
                f"{name} speaks protocol version {opening.version}, this run version {PROTOCOL_VERSION}; "
                "install the same isthmus on all machines"
            )
        return None

    def again_s(self, join: Join, now_s: float) -> float:
        """When a node that may not join should ask again: soon, where a member of its name is about to be found lost,
        as when a process was started again; 0 for never."""
        for seat in self._seats.values():
            unheard_s = now_s - seat.heard_s
            if seat.join.name == join.name and unheard_s > 2 * self._config.heartbeat_interval_s:
                return max(self._config.heartbeat_timeout_s - unheard_s, 0.0) + self._config.heartbeat_interval_s
        return 0.0

    def admit(self, peer: str, join: Join, now_s: float) -> bool:
        """Make a node a member, for which `refusal` must have returned None; or note that a member has its data now.
        False where it has only repeated its request."""
        if peer in self._seats:
            is_new = self.is_preparing(peer) and not join.preparing
            self._seats[peer].join = join if is_new else self._seats[peer].join
            return is_new
        assert not self.full
        self._seats[peer] = Seat(join, now_s)
        self.generation += 1
        return True

    def remove(self, peer: str, now_s: float) -> None:
        """Remove a member that left or was lost."""
        del self._seats[peer]
        self.generation += 1
        self._holdoff.lose(plain(peer), now_s)

    def next_generation(self) -> int:
        """A generation begins, or is over, though the members are the same: its number."""
        self.generation += 1
        return self.generation

    def is_held_off(self, peer: str, now_s: float) -> bool:
        """Whether a node was lost so often that it must wait before it takes part again."""
        return now_s < self._holdoff.until_s(plain(peer))

    def unheard_s(self, peer: str, now_s: float) -> float:
        """How long ago a member was last heard."""
        return max(0.0, now_s - self._seats[peer].heard_s)

    def hear(self, peer: str, now_s: float) -> None:
        """Note that a member was heard at `now_s`. A time before the latest one changes nothing."""
        seat = self._seats[peer]
        seat.heard_s = max(seat.heard_s, now_s)

    def excuse(self, now_s: float) -> None:
        """The coordinator's own process stood still, and could not hear anybody."""
        for seat in self._seats.values():
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

    def seat(self, peers: Sequence[str]) -> list[str]:
        """Give places to the sites of those that have none yet; all of `peers` in the order of their places, and within
        a site by local rank."""
        places = {seat.site: seat.place for seat in self._seats.values() if seat.place >= 0}
        free = set(range(self._config.nodes)) - set(places.values())
        new = [self._seats[peer] for peer in self.peers if peer in peers and self._seats[peer].site not in places]
        for seat in new:
            if seat.join.rank in free:
                places[seat.site] = seat.join.rank
                free.remove(seat.join.rank)
        for seat in new:
            if seat.site not in places:
                places[seat.site] = min(free)
                free.remove(places[seat.site])
        for peer in peers:
            self._seats[peer].place = places[self._seats[peer].site]
        return sorted(peers, key=lambda peer: (self.place(peer), self._seats[peer].join.local_rank))

    def seats(self) -> list[SavedSeat]:
        """All members, for the coordinator's state on disk."""
        return [SavedSeat(peer=peer, place=seat.place, join=seat.join) for peer, seat in self._seats.items()]

    def restore(self, seats: Iterable[SavedSeat], generation: int, now_s: float) -> None:
        """The members that the coordinator had before it was killed. They count as heard now."""
        self._seats = {saved.peer: Seat(saved.join, now_s, saved.place) for saved in seats}
        self.generation = generation

    def place(self, peer: str) -> int:
        """The place of the site of a member that has one."""
        return self._seats[peer].place

    def site(self, peer: str) -> str:
        """The name of a member's site."""
        return self._seats[peer].site

    def memory_bytes(self, peer: str) -> float:
        """The memory of a member's device; 0 where it is not known."""
        return self._seats[peer].join.memory_bytes

    def entries(self, peers: Sequence[str], joins: Container[str] = ()) -> list[RosterEntry]:
        """The roster's members, by rank; those of `joins` were none before."""
        return [_entry(peer, rank, self._seats[peer].join, peer in joins) for rank, peer in enumerate(peers)]

    def describe(self, peers: Sequence[str]) -> str:
        """Names, each with its process and host: ``node-2 (pid 71 on atlas)``."""
        return ", ".join(_describe(self._seats[peer].join) for peer in peers)

    def waiting_text(self) -> str:
        """How many nodes have joined: ``2 of 4 nodes joined: node-0, node-2; still waiting for 2 more``."""
        here = f": {', '.join(self.names)}" if self._seats else ""
        awaited = "" if self.full else f"; still waiting for {self._missing()}"
        preparing = ", ".join(plain(peer) for peer in self.peers if self.is_preparing(peer))
        told = f"; still preparing data: {preparing}" if preparing else ""
        return f"{self.count_text()} joined{here}{awaited}{told}"

    def count_text(self) -> str:
        """How many of the run's processes are members: ``2 of 4 nodes``."""
        what = "nodes" if self._layout.columns == 1 else f"processes of {self._config.nodes} sites"
        return f"{len(self._seats)} of {self._layout.processes} {what}"

    def _clash(self, join: Join) -> str | None:
        nodes = self._config.nodes
        members = [seat.join for seat in self._seats.values()]
        if (reason := self._unequal(join)) is not None:
            return reason
        for member in members:
            if member.name == join.name:
                return (
                    f"a node named {join.name} is already here ({_describe(member)}); "
                    "give each node its own name, or wait until the old one is gone"
                )
        for member in members:
            if member.address == join.address:
                return f"{member.name} already listens at {join.address}; give {join.name} an address of its own"
            if _site(member) == _site(join):
                if member.local_rank == join.local_rank:
                    return f"process {join.local_rank} of site {join.site} is already here ({_describe(member)})"
            elif member.rank == join.rank >= 0:
                return f"rank {join.rank} is taken by {member.name}; give {join.name} another rank, or none"
        if join.rank >= nodes:
            return f"rank {join.rank} is not in a world of {nodes}; ask for 0 to {nodes - 1}, or for none"
        sites = list(dict.fromkeys(_site(member) for member in members))
        if _site(join) not in sites and len(sites) == nodes:
            what = f"{nodes} nodes ({', '.join(sorted(sites, key=name_order))})"
            return f"the run is full: it has its {what}"
        return None

    def _unequal(self, join: Join) -> str | None:
        """Why a process of a site of another shape may not join: columns are across equal sites."""
        layout = self._layout
        if join.processes == layout.columns and join.local_rank < join.processes:
            return None
        has = f"{join.processes} process{'es' if join.processes > 1 else ''}"
        return (
            f"{join.name} is process {join.local_rank} of a site of {has}, and the sites of this run have "
            f"{layout.stages} stages × {layout.shards} shards; start each one by torchrun with {layout.columns} "
            "processes, or change coordinator.shards"
        )

    def _missing(self) -> str:
        """The names of the missing nodes where all names are the usual ``node-0`` to ``node-N``, else their number."""
        usual = [f"node-{number}" for number in range(self._config.nodes)]
        if self._layout.columns == 1 and all(name in usual for name in self.names):
            return ", ".join(name for name in usual if name not in self.names)
        return f"{self._layout.processes - len(self._seats)} more"


def name_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which node-2 comes before node-10. Any two names can be compared."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts)


def _entry(peer: str, rank: int, join: Join, joins: bool) -> RosterEntry:
    return RosterEntry(
        name=plain(peer),
        peer=peer,
        rank=rank,
        address=join.address,
        cores=join.cores,
        joins=joins,
        key=join.key,
        encrypted=join.encrypted,
    )


def _describe(join: Join) -> str:
    process = f"pid {join.pid}" if join.pid else ""
    where = f"on {join.host}" if join.host else ""
    detail = " ".join(part for part in (process, where) if part)
    return f"{join.name} ({detail})" if detail else join.name


def _site(join: Join) -> str:
    return join.site or join.name


def _is_peer(name: str) -> bool:
    try:
        msgspec.convert(name, Peer)
    except msgspec.ValidationError:
        return False
    return True


def _short(digest: str) -> str:
    return digest[:12] or "none"
