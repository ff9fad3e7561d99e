"""How a run goes on where members are lost, must go, differ or come in: a machine without I/O, a part of `run`.

Each call gives the actions. Afterwards the run is in a new generation or paused (`Generations.is_open` says which), or
`hopeless` holds the reason for which it must end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from coordinator import events
from coordinator.barrier import Disagreement
from coordinator.config import CoordinatorConfig
from coordinator.events import Action, Fault, Forget, PeerLost, Say, Send
from coordinator.faults import Faults
from coordinator.generations import Generations
from coordinator.live import LiveNetwork
from coordinator.membership import Membership
from coordinator.messages import Failed, Leave, Pause, shorten
from coordinator.plan import RunPlan
from coordinator.saves import Saves
from coordinator.steps import Steps
from coordinator.suspicion import COORDINATOR_ITSELF, Suspicions
from netem.errors import ConfigError
from netem.names import plain

GOING = {Leave: (events.LEFT, "left the run"), Failed: (events.FAILED, "failed"), PeerLost: (events.LOST, "was lost")}
"""How members go: as a kind of `Fault`, and in words."""


class Recovery:
    """What `run` asks where something has gone wrong."""

    def __init__(
        self,
        config: CoordinatorConfig,
        plan: RunPlan,
        membership: Membership,
        generations: Generations,
        steps: Steps,
        live: LiveNetwork,
    ) -> None:
        self.hopeless = ""
        self.saves = Saves(plan.keep_last, plan.kept)
        self.suspicions = Suspicions(config.heartbeat_timeout_s)
        self._config = config
        self._plan = plan
        self._membership = membership
        self._generations = generations
        self._steps = steps
        self._live = live
        self._faults = Faults()
        self._reason = ""  # of the last fault
        self._is_unfair = False  # the members' speeds have changed since the chunks were given out

    def lose(self, peers: Sequence[str], kind: str, reason: str, now_s: float) -> list[Action]:
        """These have left, failed or were lost; they are members no more, and neither are the other processes of their
        sites. Where they were only guests, the others go on as if they had never come."""
        unseen_s = max(self._membership.unheard_s(peer, now_s) for peer in peers)
        mates = self._others(peers)
        reason += self._as_a_whole(peers) if mates else ""
        for peer in peers:
            self._membership.remove(peer, now_s)
        actions: list[Action] = []
        if kind == events.LOST:
            for peer in peers:
                self._generations.remember(peer, reason)
            actions += [Forget(peer) for peer in peers]
        return (
            actions
            + self._tell_to_go(mates, reason, now_s)
            + self._without([*peers, *mates], kind, reason, unseen_s, now_s)
        )

    def lose_silent(self, peers: Sequence[str], now_s: float) -> list[Action]:
        """These were not heard for the heartbeat timeout."""
        verb = "was lost" if len(peers) == 1 else "were lost"
        reason = f"{self._membership.describe(peers)} {verb}: silent for {self._config.heartbeat_timeout_s:g} s"
        return self.lose(peers, events.LOST, reason, now_s)

    def evict(self, peers: Sequence[str], why: str, now_s: float) -> list[Action]:
        """These members live, and the others cannot go on with them. They are told, and may join anew."""
        mates = [*peers, *self._others(peers)]
        reason = f"{self._membership.describe(peers)} had to go: {why}"
        reason += self._as_a_whole(peers) if len(mates) > len(peers) else ""
        return self._tell_to_go(mates, reason, now_s) + self._without(mates, events.EVICTED, reason, 0.0, now_s)

    def heal(self, found: Disagreement, now_s: float) -> list[Action]:
        """Members differ in what they must have in common. The minority goes, and comes back for what the others have.
        Without a majority, or before the first step, when the nodes were not started alike, the run ends."""
        if not found.outvoted or self._steps.step == self._plan.start_step:
            self.hopeless = found.reason
            return []
        return self.evict(found.outvoted, found.reason, now_s)

    def repeat(self, reason: str, now_s: float) -> list[Action]:
        """The results of a round differ, and have been used nowhere: all members do the step again."""
        self._note(events.DISAGREED, [], reason, 0.0, now_s)
        return self._again(reason, now_s)

    def excuse(self, stood_s: float, now_s: float) -> list[Action]:
        """This process stood still for so long, maybe with the whole machine. Nobody is silent or late for that."""
        self._membership.excuse(now_s)
        self._steps.extend(stood_s)
        self.suspicions.extend(stood_s)
        return [Say(f"this coordinator stood still for {stood_s:.0f} s; the nodes get as much longer")]

    def judge_late(self, now_s: float) -> list[Action]:
        """Find those who hold the others up, once their time has passed."""
        late, reason = self._steps.late(now_s)
        for one in late:
            self.suspicions.note(COORDINATOR_ITSELF, one, reason, now_s)
        verdict = self.suspicions.verdict(self._generations.members, now_s)
        return [] if verdict is None else self.evict(verdict.peers, verdict.reason, now_s)

    def judge_paces(self, nodes: Mapping[str, Mapping[str, float]], now_s: float) -> list[Action]:
        """Find those who have become slow, or are slow no more, from what all have measured in a step."""
        actions: list[Action] = []
        for pace in self._generations.paces.note(nodes, now_s):
            kind, began_s = (events.SLOW if pace.is_slow else events.RECOVERED), pace.lasted_s
            fault = Fault(kind, (pace.name,), str(pace), self._steps.step, self._generations.number, began_s)
            if self._config.slow == "unload":
                self._is_unfair = True
                self._faults.note(fault, now_s)
            else:
                actions.append(fault._replace(done='it keeps its chunks (coordinator.slow = "name")'))
        return actions

    def wants_generation(self, now_s: float) -> bool:
        """Whether another generation should begin now, at a barrier: for those who wait, or for other shares."""
        if self._steps.travels:
            return False
        unfair, self._is_unfair = self._is_unfair, False
        return bool(self._generations.guests(now_s)) or (unfair and self._generations.is_unfair())

    def begin(self, now_s: float) -> list[Action]:
        """Begin a generation: tell its members who is in it and which chunks each one owns. Where they are too few,
        pause."""
        if not self._generations.is_enough(now_s):
            return self._pause(now_s) if self._generations.is_open else []
        known = set(self._generations.members)
        try:
            self._generations.begin(self._live.elapsed_s(now_s), now_s)
        except ConfigError as error:
            self.hopeless = "; ".join(filter(None, [self._reason, str(error)]))
            return []
        lacking = self._generations.lacking
        if joined := [peer for peer in self._generations.members if peer in lacking and peer not in known]:
            self._note(events.JOINED, joined, f"{self._membership.describe(joined)} joined the run", 0.0, now_s)
        self.suspicions.clear()
        self.saves.drop_parts()
        changes = self._live.changes()
        new = [peer for peer in self._generations.members if peer not in known]
        actions: list[Action] = [Send(peer, own) for peer, own in self._generations.rosters()]
        return actions + [Send(peer, change) for peer in new for change in changes]

    def tell_faults(self, done: str, now_s: float) -> list[Action]:
        """The faults that have not been told yet, and what was done about them."""
        return list(self._faults.tell(done, now_s))

    def paused_too_long(self) -> list[Action]:
        """Nobody has come back in time."""
        self.hopeless = f"{self._reason}; nobody came back within {self._config.join_timeout_s:g} s"
        return []

    def _pause(self, now_s: float) -> list[Action]:
        left, wanted = self._generations.nodes, self._config.min_nodes
        self._reason = f"{self._reason}; {left} of at least {wanted} nodes are left (coordinator.min_nodes)"
        told = self.tell_faults("the run pauses", now_s)
        pause = Pause(generation=self._generations.pause(), reason=shorten(self._reason))
        say = Say(f"{self._reason}; waiting {self._config.join_timeout_s:g} s for nodes to come back")
        return [*told, say, *(Send(peer, pause) for peer in self._generations.members)]

    def _others(self, peers: Sequence[str]) -> list[str]:
        """The other processes of these members' sites."""
        return [mate for mate in self._membership.mates(peers) if mate not in peers]

    def _tell_to_go(self, peers: Sequence[str], reason: str, now_s: float) -> list[Action]:
        """These live, and are members no more."""
        for peer in peers:
            self._membership.remove(peer, now_s)
        return [Send(peer, self._generations.remember(peer, reason)) for peer in peers]

    def _as_a_whole(self, peers: Sequence[str]) -> str:
        sites = list(dict.fromkeys(self._membership.site(peer) for peer in peers))
        one = len(sites) == 1
        return f"; {'site' if one else 'sites'} {', '.join(sites)} {'leaves' if one else 'leave'} as a whole"

    def _without(self, peers: Sequence[str], kind: str, reason: str, unseen_s: float, now_s: float) -> list[Action]:
        if not self._generations.lose(peers):
            return []
        self._note(kind, peers, reason, unseen_s, now_s)
        return self._again(reason, now_s)

    def _again(self, reason: str, now_s: float) -> list[Action]:
        """The generation cannot go on: begin another one, if that has not been tried too often already."""
        self._reason = reason
        if not self._generations.has_weights:
            self.hopeless = f"{reason}; no node is left that has the weights"
            return []
        if not self._generations.is_open:
            return [Say(reason)]
        if not self._generations.may_retry():
            most = self._config.max_retries_per_step
            tried = f"; step {self._steps.step + 1} was begun anew {most} times (coordinator.max_retries_per_step)"
            self.hopeless = reason + (tried if most else "")
            return []
        return [Say(reason), *self.begin(now_s)]

    def _note(self, kind: str, peers: Iterable[str], reason: str, unseen_s: float, now_s: float) -> None:
        names, steps = tuple(plain(peer) for peer in peers), self._steps
        lost_steps = steps.alone if kind in (events.LOST, events.LEFT, events.FAILED, events.EVICTED) else 0
        fault = Fault(kind, names, reason, steps.step, self._generations.number, unseen_s, lost_steps)
        self._faults.note(fault, now_s)
