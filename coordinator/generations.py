"""Who is in which generation: the roster, those who wait for the next one, and those who are gone. No I/O.

A generation begins with the members that are left and the guests that may come in, if they are enough. `run` decides
when, and tells the members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from coordinator.assignment import Assignment, share_out
from coordinator.config import CoordinatorConfig
from coordinator.layout import check_stages
from coordinator.membership import Membership
from coordinator.messages import Evicted, Ready, Roster, RosterEntry, Saved, Suspect, Vote, shorten
from coordinator.pace import Paces
from coordinator.plan import RunPlan, Worker
from coordinator.steps import Steps
from netem.errors import ConfigError, ProtocolError
from netem.names import plain

_MOST_GONE = 1000
MOST_SAVED_GONE, MOST_SAVED_CHARACTERS = 64, 200


class Generations:
    """The generations of one run. `whole` are the chunks of each place, where all nodes are there.

    `roster` is that of the newest generation, None before the first; `members` are its members by rank, without those
    that were lost since. It `is_open` until the run pauses. Where nodes are sites of several processes, `roster` is
    that of the first column, and `members` are site by site; a site is there as a whole, or not at all.
    """

    def __init__(
        self, config: CoordinatorConfig, plan: RunPlan, membership: Membership, steps: Steps, whole: Assignment
    ) -> None:
        check_stages(config.layout)
        self.roster: Roster | None = None
        self.paces = Paces(config.slow_factor, config.slow_steps)
        self.members: list[str] = []
        self.assignment = whole
        self._whole = whole
        self._config = config
        self._plan = plan
        self._relays = config.relays
        self._columns = config.layout.columns
        self._membership = membership
        self._steps = steps
        self._lacking: set[str] = set()  # members that joined and have not said yet that they have the weights
        self._gone: dict[str, str] = {}  # former members, and why they are none any more
        self._retried_step, self._retries = -1, 0
        self.is_open = False

    @property
    def number(self) -> int:
        """The newest generation's number."""
        return self.roster.generation if self.roster else 0

    @property
    def has_weights(self) -> bool:
        """Whether a member has the weights of the steps that count, for itself and for those who join."""
        return any(peer not in self._lacking for peer in self.members)

    def has_come_in(self, peer: str) -> None:
        """The member has the weights: it was ready."""
        self._lacking.discard(peer)

    def guests(self, now_s: float) -> list[str]:
        """Those who wait for the next generation and may take part in it, whole sites only."""
        waiting = [peer for peer in self._membership.peers if peer not in self.members]
        held_off = {self._membership.site(peer) for peer in waiting if self._membership.is_held_off(peer, now_s)}
        whole = [peer for peer in waiting if self._membership.is_whole(peer)]
        return [peer for peer in whole if self._membership.site(peer) not in held_off]

    @property
    def nodes(self) -> int:
        """How many nodes are in this generation. One that is a site of several processes counts once."""
        return len(self.members) // self._columns

    def is_enough(self, now_s: float) -> bool:
        """Whether a generation can begin: somebody has the weights, and there are as many nodes as the user wants."""
        count = self.nodes + len(self.guests(now_s)) // self._columns
        return (self.roster is None or self.has_weights) and count >= self._config.min_nodes

    def begin(self, elapsed_s: float, now_s: float) -> Roster:
        """Begin the next generation; `is_enough` must be true. `elapsed_s` is the time since the run's first roster.
        Raises `ConfigError` where the chunks do not fit into the members' memory."""
        first = self.roster is None
        guests = self.guests(now_s)
        self._lacking = set() if first else (self._lacking & set(self.members)) | set(guests)
        self.members = self._membership.seat([*self.members, *guests])
        self.assignment = self._dealt()
        self.roster = Roster(
            generation=self._membership.next_generation() if not first else self._membership.generation,
            start_step=self._steps.step,
            elapsed_s=elapsed_s,
            members=self._column(0),
            assignment=self.assignment.to_lists(),
            relays=self._relays,
        )
        config = self._config
        timeout_s = config.progress_timeout_s if self._lacking else config.step_timeout_s
        weights, generation = self.assignment.weights(), self.roster.generation
        self._steps.begin(self.members, weights, generation, timeout_s, self._columns)
        self.is_open = True
        return self.roster

    def rosters(self) -> list[tuple[str, Roster]]:
        """What to tell each member of this generation: the roster of its column."""
        assert self.roster is not None
        columns = [msgspec.structs.replace(self.roster, members=self._column(c)) for c in range(self._columns)]
        return [(peer, columns[place % self._columns]) for place, peer in enumerate(self.members)]

    def _column(self, column: int) -> list[RosterEntry]:
        return self._membership.entries(self.members[column :: self._columns], self._lacking)

    def is_unfair(self) -> bool:
        """Whether a new generation would give the chunks out otherwise, for the speeds of the members; not where they
        would not fit then."""
        try:
            return self._dealt() != self.assignment
        except ConfigError:
            return False

    def _dealt(self) -> Assignment:
        """The chunks of the nodes, by rank: those that the run began with, where all are there and none is slow."""
        slow = self.paces.slow if self._config.slow == "unload" else {}
        sites = [self.members[at : at + self._columns] for at in range(0, len(self.members), self._columns)]
        is_whole = len(sites) == self._whole.n_ranks and not slow
        if self._plan.share_out is not None and not is_whole:
            return self._plan.share_out([self._worker(site) for site in sites])
        places = [self._membership.place(site[0]) for site in sites]
        slowness = [max(slow.get(plain(peer), 1.0) for peer in site) for site in sites]
        return share_out(self._whole, self._config.assignment, places, slowness)

    def _worker(self, site: Sequence[str]) -> Worker:
        """A node, which is as fast as the slowest of its processes, and has the memory of the one with the least."""
        speeds, first = self.paces.speeds(), site[0]
        speed = min(speeds.get(plain(peer), 0.0) for peer in site)
        memory_bytes = min(self._membership.memory_bytes(peer) for peer in site)
        return Worker(plain(first), self._membership.place(first), speed, memory_bytes)

    @property
    def lacking(self) -> list[str]:
        """The members that have not said yet that they have the weights."""
        return sorted(self._lacking)

    @property
    def gone(self) -> dict[str, str]:
        """The last former members that may not know that they are none any more, and why they are none."""
        return {peer: reason[:MOST_SAVED_CHARACTERS] for peer, reason in list(self._gone.items())[-MOST_SAVED_GONE:]}

    def restore(self, members: Sequence[str], lacking: Sequence[str], gone: Mapping[str, str]) -> None:
        """The members of the newest generation before the coordinator was killed. The next one is still to begin."""
        self.members = self._membership.seat(list(members))
        self._lacking = set(lacking)
        self._gone = dict(gone)
        self.roster = Roster(
            generation=self._membership.generation,
            start_step=self._steps.step,
            members=self._membership.entries(self.members[:: self._columns]),
            assignment=self.assignment.to_lists(),
        )

    def pause(self) -> int:
        """The newest generation is over and no other one begins yet: the number that stands between them."""
        self.is_open = False
        return self._membership.next_generation()

    def may_retry(self) -> bool:
        """Count one more try at the step that does not count yet; whether there may be one."""
        if self._retried_step != self._steps.step:
            self._retried_step, self._retries = self._steps.step, 0
        self._retries += 1
        return self._retries <= self._config.max_retries_per_step

    def is_stale(self, peer: str, message: object) -> bool:
        """Whether a message belongs to an older generation, and so to nothing any more. Raises `ProtocolError` for one
        of a generation that the sender cannot know."""
        if self.roster is None or not isinstance(message, Ready | Vote | Saved | Suspect):
            return False
        if message.generation > self.number or (message.generation == self.number and peer not in self.members):
            what = type(message).__name__
            raise ProtocolError(f"{what} of generation {message.generation}, this is {self.number}", peer=peer)
        return message.generation < self.number or not self.is_open

    def lose(self, peers: Sequence[str]) -> bool:
        """These are no members any more. Whether one of them was in this generation."""
        left = [peer for peer in self.members if peer not in peers]
        was, self.members = len(left) < len(self.members), left
        return was

    def remember(self, peer: str, reason: str) -> Evicted:
        """The peer is no member any more, and may not know it; what to tell it."""
        while len(self._gone) >= _MOST_GONE:
            del self._gone[next(iter(self._gone))]
        self._gone[peer] = reason
        return Evicted(reason=shorten(reason))

    def forgive(self, peer: str) -> None:
        """The peer has asked to join anew."""
        self._gone.pop(peer, None)

    def eviction(self, peer: str) -> Evicted | None:
        """What to tell a peer that is no member any more and speaks as if it were; None for a stranger."""
        reason = self._gone.get(peer)
        return None if reason is None else Evicted(reason=shorten(reason))

    def describe(self) -> str:
        """Who goes on, in words: ``generation 4 has 2 nodes (node-0, node-2) with 2/2 chunks``."""
        count = self.nodes
        names = ", ".join(self._membership.site(peer) for peer in self.members[:: self._columns])
        chunks = "/".join(str(len(own)) for own in self.assignment.to_lists())
        return f"generation {self.number} has {count} node{'s' if count > 1 else ''} ({names}) with {chunks} chunks"
