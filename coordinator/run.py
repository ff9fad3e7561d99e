"""The coordinator's side of the protocol: one machine without I/O, one table.

Events and the time go in (`Run.handle`), actions come out; `server` carries them out. A run goes JOINING →
BARRIER ⇄ ROUND → STOPPING → FINISHED. What is not in `TABLE` is a `ProtocolError`, raised before anything
has changed. For now a lost member ends the run; the others are told who it was. The node's side is
`member`; the parts are `membership`, `barrier`, `rounds` and `saves`, and beside them `live`, the network's changes.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from coordinator.assignment import assign
from coordinator.barrier import Barrier, BarrierState
from coordinator.config import CoordinatorConfig
from coordinator.events import (
    Action,
    Cancelled,
    CheckpointComplete,
    Event,
    Faulted,
    Finish,
    Forget,
    PeerLost,
    Received,
    Record,
    Send,
    Tick,
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
    Round,
    Saved,
    Stop,
    Vote,
    Welcome,
    shorten,
)
from coordinator.plan import RunPlan
from coordinator.rounds import Ballot, RoundState
from coordinator.saves import Saves
from netem.errors import ProtocolError
from netem.names import plain


class Phase(enum.Enum):
    """Where the run is. BARRIER covers the computing of a step too: all work towards the next one."""

    JOINING = "the nodes are joining"
    BARRIER = "a step is computed"
    ROUND = "a round is open"
    STOPPING = "the run is ending"
    FINISHED = "the run is over"


class Run:
    """One run from the first joiner to the last farewell. `now_s` is any clock that never runs backwards.

    Raises `ConfigError` at once where the chunks cannot be assigned.
    """

    def __init__(self, config: CoordinatorConfig, plan: RunPlan, now_s: float) -> None:
        self.assignment = assign(plan.chunks, config.nodes, config.assignment, config.chunks_per_node)
        self.membership = Membership(config, plan.run_name, plan.config_digest)
        self.phase = Phase.JOINING
        self.step = plan.start_step  # how many steps all nodes have done
        self._config = config
        self._plan = plan
        self._world: list[str] = []  # members by rank, once complete
        self._barrier = Barrier((), plan.start_step, config.step_timeout_s)
        self._ballot: Ballot | None = None
        self._rounds: deque[Round] = deque()
        self._next_round_id = 0
        self._saves = Saves()
        self._live = LiveNetwork(plan.schedule)
        self._outcome = Finish(False, "")
        # Of the whole phase: the rendezvous, progress of any kind, the farewells.
        self._deadline_s = now_s + config.join_timeout_s
        self._next_beat_s = now_s

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in, give the actions it causes, in order.

        Raises `ProtocolError` naming the peer where `TABLE` has no such move or the message is wrong; the
        caller then hands in `Faulted` for that peer.
        """
        peer, subject = _subject(event)
        if isinstance(event, Received | PeerLost | Faulted) and not isinstance(subject, Join | Ask):
            if peer not in self.membership:  # a stranger, or one that has left or been given up
                return [Forget(peer)] if isinstance(event, PeerLost) else []
            if isinstance(event, Received):
                self.membership.hear(peer, now_s)
        elif isinstance(subject, Join) and peer in self.membership:
            return []  # it asked twice, since our answer was slow
        move = TABLE.get((self.phase, type(subject)))
        if move is None:
            raise ProtocolError(f"{type(subject).__name__} while {self.phase.value}", peer=peer)
        return move(self, peer, subject, now_s)

    # Moves: (peer, subject of the event, time) → actions.

    def _join(self, peer: str, join: Join, now_s: float) -> list[Action]:
        reason = self.membership.refusal(peer, join)
        if reason is not None:
            return [Send(peer, Refused(reason=shorten(reason), address=join.address))]
        self.membership.admit(peer, join, now_s)
        welcome = Welcome(
            rank=join.rank,
            heartbeat_interval_s=self._config.heartbeat_interval_s,
            heartbeat_timeout_s=self._config.heartbeat_timeout_s,
        )
        actions: list[Action] = [Send(peer, welcome)]
        return actions + (self._begin(now_s) if self.membership.complete else [])

    def _join_late(self, peer: str, join: Join, now_s: float) -> list[Action]:
        reason = self.membership.refusal(peer, join)
        if reason is None:
            reason = f"{self.phase.value} at step {self.step}; nobody can join any more"
        return [Send(peer, Refused(reason=shorten(reason), address=join.address))]

    def _heartbeat(self, peer: str, message: Heartbeat, now_s: float) -> list[Action]:
        return []  # heard already

    def _depart(self, peer: str, message: Leave | Failed | PeerLost, now_s: float) -> list[Action]:
        """Go before the world was complete: the place is free again."""
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
        assert self._ballot is not None
        self._ballot.vote(peer, vote, now_s)
        self._progress(now_s)
        return self._count(now_s)

    def _save(self, peer: str, saved: Saved, now_s: float) -> list[Action]:
        if not self._plan.start_step <= saved.step <= self.step + 1:
            raise ProtocolError(f"saved step {saved.step} where the run is at step {self.step}", peer=peer)
        complete = self._saves.note(peer, saved.step, self._world)
        self._progress(now_s)
        return [CheckpointComplete(saved.step)] if complete else []

    def _ask(self, peer: str, ask: Ask, now_s: float) -> list[Action]:
        """About the network, from a person outside."""
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
        """Nonsense before the world was complete: that one is told why and goes, the others wait on."""
        self.membership.remove(peer)
        return [Send(peer, Stop(ok=False, reason=shorten(fault.reason)))]

    def _blame(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        return self._end(False, fault.reason, now_s)

    def _part(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        return self._drop(peer) + self._finish_if_alone()

    def _late(self, peer: str, message: Ready | Vote, now_s: float) -> list[Action]:
        return []  # was under way when the run ended

    def _cancel(self, peer: str, cancelled: Cancelled, now_s: float) -> list[Action]:
        return self._end(False, cancelled.reason, now_s)

    def _nothing(self, peer: str, subject: object, now_s: float) -> list[Action]:
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
        if self._ballot is not None:
            self._ballot.tick(now_s)
            if self._ballot.state is not RoundState.OPEN:
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
        members = self.membership.ranked()
        names = [entry.name for entry in members]
        if (reason := self._plan.schedule.unmatched([*names, COORDINATOR])) is not None:
            return self._end(False, reason, now_s)
        self._world = [entry.peer for entry in members]
        roster = Roster(
            generation=self.membership.generation,
            start_step=self.step,
            members=members,
            assignment=self.assignment.to_lists(),
        )
        self._progress(now_s)
        self._await_step(self.step)
        return self._broadcast(roster) + self._live.begin(now_s)

    def _await_step(self, step: int) -> None:
        self.phase = Phase.BARRIER
        self._ballot = None
        self._barrier = Barrier(self._world, step, self._config.step_timeout_s)

    def _go(self) -> list[Action]:
        kinds = self._plan.rounds_for(self.step)
        weights = self.assignment.weights()
        rounds = [Round(round_id=self._next_round_id + i, kind=kind, weights=weights) for i, kind in enumerate(kinds)]
        self._next_round_id += len(rounds)
        self._rounds = deque(rounds)
        cursor = self._plan.start_cursor + self._plan.batch * (self.step - self._plan.start_step)
        self._open_round()
        generation = self.membership.generation
        return self._broadcast(Go(step=self.step, generation=generation, cursor=cursor, rounds=rounds))

    def _open_round(self) -> None:
        """Open the step's next round; without one, the step's end is the next barrier."""
        if not self._rounds:
            self._await_step(self.step + 1)
            return
        self.phase = Phase.ROUND
        self._ballot = Ballot(self._world, self._rounds.popleft(), self.step, self._config.step_timeout_s)

    def _count(self, now_s: float) -> list[Action]:
        assert self._ballot is not None
        ballot = self._ballot
        if ballot.state is RoundState.OPEN:
            return []
        round_id = ballot.round.round_id
        if ballot.state is RoundState.ABORTED:
            abort = Abort(round_id=round_id, reason=shorten(ballot.reason))
            return self._broadcast(abort) + self._end(False, ballot.reason, now_s)
        self._open_round()
        return self._broadcast(Commit(round_id=round_id))

    def _drop(self, peer: str, message: Leave | Failed | PeerLost | None = None) -> list[Action]:
        """Take a member out. One that took its leave still waits for the acknowledgement of that."""
        self.membership.remove(peer)
        return [] if isinstance(message, Leave | Failed) else [Forget(peer)]

    def _end(self, ok: bool, reason: str, now_s: float) -> list[Action]:
        """Tell all that the run is over, then wait for farewells for as long as a heartbeat may take."""
        if not ok and self._world:
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


def _subject(event: Event) -> tuple[str, Any]:
    """Who the event is about, and what the table looks up: the message, or the event itself."""
    if isinstance(event, Received):
        return event.peer, event.message
    return (event.peer if isinstance(event, PeerLost | Faulted) else ""), event


TABLE: Final[Mapping[tuple[Phase, type], Callable[[Run, str, Any, float], list[Action]]]] = {
    (Phase.JOINING, Join): Run._join,
    (Phase.JOINING, Ask): Run._ask,
    (Phase.JOINING, Heartbeat): Run._heartbeat,
    (Phase.JOINING, Leave): Run._depart,
    (Phase.JOINING, Failed): Run._depart,
    (Phase.JOINING, PeerLost): Run._depart,
    (Phase.JOINING, Faulted): Run._expel,
    (Phase.JOINING, Cancelled): Run._cancel,
    (Phase.JOINING, Tick): Run._tick_joining,
    # A step is computed, and then its successor awaited.
    (Phase.BARRIER, Join): Run._join_late,
    (Phase.BARRIER, Ask): Run._ask,
    (Phase.BARRIER, Heartbeat): Run._heartbeat,
    (Phase.BARRIER, Ready): Run._ready,
    (Phase.BARRIER, Saved): Run._save,
    (Phase.BARRIER, Changed): Run._changed,
    (Phase.BARRIER, Leave): Run._lose,
    (Phase.BARRIER, Failed): Run._lose,
    (Phase.BARRIER, PeerLost): Run._lose,
    (Phase.BARRIER, Faulted): Run._blame,
    (Phase.BARRIER, Cancelled): Run._cancel,
    (Phase.BARRIER, Tick): Run._tick_running,
    # A step with averaging rounds is computed, and then voted on.
    (Phase.ROUND, Join): Run._join_late,
    (Phase.ROUND, Ask): Run._ask,
    (Phase.ROUND, Heartbeat): Run._heartbeat,
    (Phase.ROUND, Vote): Run._vote,
    (Phase.ROUND, Saved): Run._save,
    (Phase.ROUND, Changed): Run._changed,
    (Phase.ROUND, Leave): Run._lose,
    (Phase.ROUND, Failed): Run._lose,
    (Phase.ROUND, PeerLost): Run._lose,
    (Phase.ROUND, Faulted): Run._blame,
    (Phase.ROUND, Cancelled): Run._cancel,
    (Phase.ROUND, Tick): Run._tick_running,
    # All have been told; what they said before they heard is still legal.
    (Phase.STOPPING, Join): Run._join_late,
    (Phase.STOPPING, Ask): Run._ask_late,
    (Phase.STOPPING, Heartbeat): Run._heartbeat,
    (Phase.STOPPING, Ready): Run._late,
    (Phase.STOPPING, Vote): Run._late,
    (Phase.STOPPING, Saved): Run._save,
    (Phase.STOPPING, Changed): Run._changed,
    (Phase.STOPPING, Leave): Run._farewell,
    (Phase.STOPPING, Failed): Run._farewell,
    (Phase.STOPPING, PeerLost): Run._farewell,
    (Phase.STOPPING, Faulted): Run._part,
    (Phase.STOPPING, Cancelled): Run._nothing,
    (Phase.STOPPING, Tick): Run._tick_stopping,
    (Phase.FINISHED, Join): Run._join_late,
    (Phase.FINISHED, Ask): Run._ask_late,
    (Phase.FINISHED, Heartbeat): Run._nothing,
    (Phase.FINISHED, Cancelled): Run._nothing,
    (Phase.FINISHED, Tick): Run._nothing,
}
