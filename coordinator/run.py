"""The coordinator's side of the protocol: one machine without I/O, one table.

Events and the time go in (`Run.handle`), actions come out, and `server` carries them out. A run goes JOINING →
BARRIER ⇄ ROUND → STOPPING → FINISHED; `docs/protocol.md` has the diagram. `TABLE` holds every legal move and the
phases to which it may lead. Any other event raises `ProtocolError` before anything has changed. A lost member ends the
run, and the others are told which one it was. `member` is the node's side; `membership`, `barrier`, `rounds`, `saves`
and `live` are this machine's parts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final

from coordinator.assignment import assign
from coordinator.barrier import Barrier, BarrierState
from coordinator.config import CoordinatorConfig
from coordinator.events import (
    Action,
    Cancelled,
    CheckpointComplete,
    CheckpointFailed,
    Event,
    Faulted,
    Finish,
    Forget,
    PeerLost,
    Received,
    Record,
    Send,
    Tick,
    subject_of,
)
from coordinator.live import LiveNetwork
from coordinator.membership import Membership
from coordinator.messages import (
    COORDINATOR,
    Abort,
    Ask,
    Changed,
    Commit,
    CoordinatorMessage,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    Ready,
    Refused,
    Roster,
    Saved,
    Stop,
    Vote,
    shorten,
)
from coordinator.plan import RunPlan
from coordinator.rounds import RoundState, StepRounds
from coordinator.saves import Saves
from coordinator.table import Table, arrive, row
from netem.errors import ProtocolError
from netem.names import plain


class Phase(enum.Enum):
    """Where the run is. BARRIER includes the time in which the nodes compute the step before that barrier."""

    JOINING = "the nodes are joining"
    BARRIER = "a step is being computed"
    ROUND = "an averaging round is open"
    STOPPING = "the run is ending"
    FINISHED = "the run is over"


class Run:
    """One run, from the first node that joins to the last that leaves. Times are seconds of a monotonic clock.

    `step` is the number of steps that all nodes have done. Raises `ConfigError` where the chunks cannot be assigned.
    """

    def __init__(self, config: CoordinatorConfig, plan: RunPlan, now_s: float) -> None:
        self.assignment = assign(plan.chunks, config.nodes, config.assignment, config.chunks_per_node)
        self.membership = Membership(config, plan.run_name, plan.config_digest)
        self.phase = Phase.JOINING
        self.step = plan.start_step
        self._config = config
        self._plan = plan
        self._roster: Roster | None = None  # the members of this generation, once all have joined
        self._barrier = Barrier((), plan.start_step, config.step_timeout_s)
        self._rounds = StepRounds(config.step_timeout_s)
        self._saves = Saves(plan.keep_last, plan.kept)
        self._live = LiveNetwork(plan.schedule)
        self._outcome = Finish(False, "")
        # The end of the rendezvous, of the time without any progress, or of the farewells, depending on the phase.
        self._deadline_s = now_s + config.join_timeout_s
        self._next_beat_s = now_s

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in and return the actions that it causes, in order.

        Raises `ProtocolError`, which names the peer, where `TABLE` has no such move or the message is wrong. The caller
        then hands in `Faulted` for that peer.
        """
        peer, subject = subject_of(event)
        if isinstance(event, Received | PeerLost | Faulted) and not isinstance(subject, Join | Ask):
            if peer not in self.membership:  # a stranger, or a member that has left or was removed
                return [Forget(peer)] if isinstance(event, PeerLost) else []
            if isinstance(event, Received):
                self.membership.hear(peer, now_s)
        elif isinstance(subject, Join) and peer in self.membership:
            return []  # it repeated its request because our answer was slow
        before, kind = self.phase, type(subject)
        if (before, kind) not in TABLE:
            raise ProtocolError(f"{kind.__name__} while {before.value}", peer=peer)
        actions = TABLE[before, kind].move(self, peer, subject, now_s)
        arrive(TABLE, before, kind, self.phase)
        return actions

    # The moves. Each takes the peer, the event's subject and the time, and returns actions.

    def _join(self, peer: str, join: Join, now_s: float) -> list[Action]:
        reason = self.membership.refusal(peer, join)
        if reason is not None:
            return [Send(peer, Refused(reason=shorten(reason), address=join.address))]
        self.membership.admit(peer, join, now_s)
        actions: list[Action] = [Send(peer, self.membership.welcome(join))]
        return actions + (self._begin(now_s) if self.membership.complete else [])

    def _join_late(self, peer: str, join: Join, now_s: float) -> list[Action]:
        reason = self.membership.refusal(peer, join)
        if reason is None:
            reason = f"{self.phase.value} at step {self.step}; nobody can join any more"
        return [Send(peer, Refused(reason=shorten(reason), address=join.address))]

    def _depart(self, peer: str, message: Leave | Failed | PeerLost, now_s: float) -> list[Action]:
        """A member leaves before all have joined: its place is free again."""
        return self._drop(peer, message)

    def _ready(self, peer: str, ready: Ready, now_s: float) -> list[Action]:
        self._barrier.ready(peer, ready, now_s)
        self._progress(now_s)
        if self._barrier.state is not BarrierState.FULL:
            return []
        if (reason := self._barrier.disagreement()) is not None:
            return self._end(False, reason, now_s)
        self.step = self._barrier.step
        actions: list[Action] = []
        if metrics := self._barrier.metrics():
            actions.append(Record(self.step, self.membership.generation, metrics, self._live.news(now_s)))
        if self.step >= self._plan.steps:
            return actions + self._end(True, "", now_s)
        return actions + self._go()

    def _vote(self, peer: str, vote: Vote, now_s: float) -> list[Action]:
        self._rounds.vote(peer, vote, now_s)
        self._progress(now_s)
        return self._count(now_s)

    def _save(self, peer: str, saved: Saved, now_s: float) -> list[Action]:
        if not self._plan.start_step <= saved.step <= self.step + 1:
            raise ProtocolError(f"saved step {saved.step} where the run is at step {self.step}", peer=peer)
        self._progress(now_s)
        if saved.reason:
            return [CheckpointFailed(saved.step, f"{plain(peer)}: {saved.reason}")]
        complete = self._saves.note(peer, saved.step, self._members)
        return [CheckpointComplete(saved.step)] if complete else []

    def _ask(self, peer: str, ask: Ask, now_s: float) -> list[Action]:
        """A person outside the run asks about the network, or for a change of it."""
        if (reason := self.membership.refusal_to_talk("this command", ask)) is not None:
            return [Send(peer, Refused(reason=shorten(reason)))]
        members = {member: plain(member) for member in self.membership.peers}
        return self._live.ask(peer, ask, members, self.step, now_s)

    def _ask_late(self, peer: str, ask: Ask, now_s: float) -> list[Action]:
        reason = self.membership.refusal_to_talk("this command", ask) or f"{self.phase.value}; nothing can be changed"
        return [Send(peer, Refused(reason=shorten(reason)))]

    def _changed(self, peer: str, changed: Changed, now_s: float) -> list[Action]:
        return self._live.confirm(peer, changed.number, self.step, now_s)

    def _lose(self, peer: str, message: Leave | Failed | PeerLost, now_s: float) -> list[Action]:
        verb = {Leave: "left the run", Failed: "failed", PeerLost: "was lost"}[type(message)]
        why = f": {message.reason}" if message.reason else ""
        reason = f"{self.membership.describe([peer])} {verb}{why}"
        return self._drop(peer, message) + self._end(False, reason, now_s)

    def _farewell(self, peer: str, message: Leave | Failed | PeerLost, now_s: float) -> list[Action]:
        return self._drop(peer, message) + self._finish_if_alone()

    def _expel(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        """A member broke the protocol before all had joined: it is told why and removed, and the others wait on."""
        self.membership.remove(peer)
        return [Send(peer, Stop(ok=False, reason=shorten(fault.reason)))]

    def _blame(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        return self._end(False, fault.reason, now_s)

    def _part(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        return self._drop(peer) + self._finish_if_alone()

    def _cancel(self, peer: str, cancelled: Cancelled, now_s: float) -> list[Action]:
        return self._end(False, cancelled.reason, now_s)

    def _nothing(self, peer: str, subject: object, now_s: float) -> list[Action]:
        """A sign of life, which `handle` has noted, or a message that was sent before its sender heard of the end."""
        return []

    # Time.

    def _tick_joining(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s)
        for silent in self.membership.silent(now_s):
            actions += self._drop(silent)
        if now_s > self._deadline_s:
            waited_s = self._config.join_timeout_s
            actions += self._end(False, f"after {waited_s:g} s {self.membership.waiting_text()}", now_s)
        return actions

    def _tick_running(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s) + self._live.tick(self.step, now_s)
        if silent := self.membership.silent(now_s):
            verb = "was lost" if len(silent) == 1 else "were lost"
            why = f"silent for {self._config.heartbeat_timeout_s:g} s"
            text = f"{self.membership.describe(silent)} {verb}: {why}"
            for lost in silent:
                actions += self._drop(lost)
            return actions + self._end(False, text, now_s)
        if self.phase is Phase.ROUND:
            if self._rounds.tick(now_s) is not RoundState.OPEN:
                return actions + self._count(now_s)
        elif (reason := self._barrier.overdue(now_s)) is not None:
            return actions + self._end(False, reason, now_s)
        if now_s > self._deadline_s:
            what = f"no node made progress for {self._config.progress_timeout_s:g} s"
            actions += self._end(False, f"step {self._barrier.step}: {what}", now_s)
        return actions

    def _tick_stopping(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s)
        for silent in self.membership.silent(now_s):
            actions += self._drop(silent)
        if now_s > self._deadline_s:
            self.phase = Phase.FINISHED
            return [*actions, self._outcome]
        return actions + self._finish_if_alone()

    # Steps of the run.

    def _begin(self, now_s: float) -> list[Action]:
        """All have joined: tell them who is here and which chunks each one owns, and wait for the first barrier."""
        roster = self.membership.roster(self.step, self.assignment)
        names = [entry.name for entry in roster.members]
        if (reason := self._plan.schedule.unmatched([*names, COORDINATOR])) is not None:
            return self._end(False, reason, now_s)
        self._roster = roster
        self._progress(now_s)
        self._await_step(self.step)
        return self._broadcast(roster) + self._live.begin(now_s)

    def _await_step(self, step: int) -> None:
        self.phase = Phase.BARRIER
        self._barrier = Barrier(self._members, step, self._config.step_timeout_s)

    def _go(self) -> list[Action]:
        plan, step, weights = self._plan, self.step, self.assignment.weights()
        begins = self._rounds.begin(plan.begins_for(step), weights)
        rounds = self._rounds.number(plan.rounds_for(step), weights, plan.ends_for(step))
        self._open_round()
        go = Go(
            step=step,
            generation=self.membership.generation,
            cursor=plan.cursor_at(step),
            rounds=rounds,
            begins=begins,
            keep_from=self._saves.oldest_kept,
        )
        return self._broadcast(go)

    def _open_round(self) -> None:
        """Open the step's next round; where none is left, wait for the next barrier."""
        if self._rounds.open_next(self._members, self.step):
            self.phase = Phase.ROUND
        else:
            self._await_step(self.step + 1)

    def _count(self, now_s: float) -> list[Action]:
        ballot = self._rounds.ballot
        if ballot.state is RoundState.OPEN:
            return []
        round_id = ballot.round.round_id
        if ballot.state is RoundState.ABORTED:
            abort = Abort(round_id=round_id, reason=shorten(ballot.reason))
            return self._broadcast(abort) + self._end(False, ballot.reason, now_s)
        self._open_round()
        return self._broadcast(Commit(round_id=round_id))

    @property
    def _members(self) -> list[str]:
        """The members of this generation by rank; none before all have joined."""
        return [entry.peer for entry in self._roster.members] if self._roster else []

    def _drop(self, peer: str, message: Leave | Failed | PeerLost | None = None) -> list[Action]:
        """Remove a member. One that said that it leaves is not forgotten yet: it waits for an acknowledgement."""
        self.membership.remove(peer)
        return [] if isinstance(message, Leave | Failed) else [Forget(peer)]

    def _end(self, ok: bool, reason: str, now_s: float) -> list[Action]:
        """Tell all that the run is over, then wait for their farewells, for at most the heartbeat timeout."""
        if not ok and self._roster:
            reason = f"{reason}; the last complete step is {self.step}"
        self.phase = Phase.STOPPING
        self._outcome = Finish(ok, reason)
        self._deadline_s = now_s + self._config.heartbeat_timeout_s
        answers = self._live.tick(self.step, now_s, ends=True)
        return self._broadcast(Stop(ok=ok, reason=shorten(reason))) + answers + self._finish_if_alone()

    def _finish_if_alone(self) -> list[Action]:
        if len(self.membership):
            return []
        self.phase = Phase.FINISHED
        return [self._outcome]

    def _broadcast(self, message: CoordinatorMessage) -> list[Action]:
        return [Send(peer, message) for peer in self.membership.peers]

    def _beat(self, now_s: float) -> list[Action]:
        if now_s < self._next_beat_s:
            return []
        self._next_beat_s = now_s + self._config.heartbeat_interval_s
        return self._broadcast(Heartbeat())

    def _progress(self, now_s: float) -> None:
        if self.phase is not Phase.STOPPING:  # the farewells have a deadline of their own
            self._deadline_s = now_s + self._config.progress_timeout_s


Move = Callable[[Run, str, Any, float], list[Action]]

TABLE: Final[Table[Phase, Move]] = {
    (Phase.JOINING, Join): row(Run._join, Phase.JOINING, Phase.BARRIER, Phase.STOPPING),
    (Phase.JOINING, Ask): row(Run._ask, Phase.JOINING),
    (Phase.JOINING, Heartbeat): row(Run._nothing, Phase.JOINING),
    (Phase.JOINING, Leave): row(Run._depart, Phase.JOINING),
    (Phase.JOINING, Failed): row(Run._depart, Phase.JOINING),
    (Phase.JOINING, PeerLost): row(Run._depart, Phase.JOINING),
    (Phase.JOINING, Faulted): row(Run._expel, Phase.JOINING),
    (Phase.JOINING, Cancelled): row(Run._cancel, Phase.STOPPING, Phase.FINISHED),
    (Phase.JOINING, Tick): row(Run._tick_joining, Phase.JOINING, Phase.STOPPING, Phase.FINISHED),
    # The nodes compute a step that has no averaging round, or wait for the next barrier.
    (Phase.BARRIER, Join): row(Run._join_late, Phase.BARRIER),
    (Phase.BARRIER, Ask): row(Run._ask, Phase.BARRIER),
    (Phase.BARRIER, Heartbeat): row(Run._nothing, Phase.BARRIER),
    (Phase.BARRIER, Ready): row(Run._ready, Phase.BARRIER, Phase.ROUND, Phase.STOPPING),
    (Phase.BARRIER, Saved): row(Run._save, Phase.BARRIER),
    (Phase.BARRIER, Changed): row(Run._changed, Phase.BARRIER),
    (Phase.BARRIER, Leave): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.BARRIER, Failed): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.BARRIER, PeerLost): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.BARRIER, Faulted): row(Run._blame, Phase.STOPPING),
    (Phase.BARRIER, Cancelled): row(Run._cancel, Phase.STOPPING),
    (Phase.BARRIER, Tick): row(Run._tick_running, Phase.BARRIER, Phase.STOPPING, Phase.FINISHED),
    # The nodes compute a step that has averaging rounds, and vote on the first that is still open.
    (Phase.ROUND, Join): row(Run._join_late, Phase.ROUND),
    (Phase.ROUND, Ask): row(Run._ask, Phase.ROUND),
    (Phase.ROUND, Heartbeat): row(Run._nothing, Phase.ROUND),
    (Phase.ROUND, Vote): row(Run._vote, Phase.ROUND, Phase.BARRIER, Phase.STOPPING),
    (Phase.ROUND, Saved): row(Run._save, Phase.ROUND),
    (Phase.ROUND, Changed): row(Run._changed, Phase.ROUND),
    (Phase.ROUND, Leave): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.ROUND, Failed): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.ROUND, PeerLost): row(Run._lose, Phase.STOPPING, Phase.FINISHED),
    (Phase.ROUND, Faulted): row(Run._blame, Phase.STOPPING),
    (Phase.ROUND, Cancelled): row(Run._cancel, Phase.STOPPING),
    (Phase.ROUND, Tick): row(Run._tick_running, Phase.ROUND, Phase.STOPPING, Phase.FINISHED),
    # All have been told of the end. What they sent before they heard of it is still legal.
    (Phase.STOPPING, Join): row(Run._join_late, Phase.STOPPING),
    (Phase.STOPPING, Ask): row(Run._ask_late, Phase.STOPPING),
    (Phase.STOPPING, Heartbeat): row(Run._nothing, Phase.STOPPING),
    (Phase.STOPPING, Ready): row(Run._nothing, Phase.STOPPING),
    (Phase.STOPPING, Vote): row(Run._nothing, Phase.STOPPING),
    (Phase.STOPPING, Saved): row(Run._save, Phase.STOPPING),
    (Phase.STOPPING, Changed): row(Run._changed, Phase.STOPPING),
    (Phase.STOPPING, Leave): row(Run._farewell, Phase.STOPPING, Phase.FINISHED),
    (Phase.STOPPING, Failed): row(Run._farewell, Phase.STOPPING, Phase.FINISHED),
    (Phase.STOPPING, PeerLost): row(Run._farewell, Phase.STOPPING, Phase.FINISHED),
    (Phase.STOPPING, Faulted): row(Run._part, Phase.STOPPING, Phase.FINISHED),
    (Phase.STOPPING, Cancelled): row(Run._nothing, Phase.STOPPING),
    (Phase.STOPPING, Tick): row(Run._tick_stopping, Phase.STOPPING, Phase.FINISHED),
    (Phase.FINISHED, Join): row(Run._join_late, Phase.FINISHED),
    (Phase.FINISHED, Ask): row(Run._ask_late, Phase.FINISHED),
    (Phase.FINISHED, Heartbeat): row(Run._nothing, Phase.FINISHED),
    (Phase.FINISHED, Cancelled): row(Run._nothing, Phase.FINISHED),
    (Phase.FINISHED, Tick): row(Run._nothing, Phase.FINISHED),
}
