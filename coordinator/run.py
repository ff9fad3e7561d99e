"""The coordinator's side of the protocol: one machine without I/O, one table.

Events and the time go in (`Run.handle`), actions come out, and `server` carries them out. A run goes JOINING →
BARRIER ⇄ ROUND → STOPPING → FINISHED; `docs/protocol.md` has the diagram. `TABLE` holds every legal move and the
phases to which it may lead. Any other event raises `ProtocolError` before anything has changed.

Where a member is lost or has to go, a new generation begins: the step that does not count yet is done again, and the
chunks are shared out anew. Those who wait come in with it, or at the next barrier; with too few the run is PAUSED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from coordinator import restart
from coordinator.assignment import assign
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
from coordinator.generations import Generations
from coordinator.live import LiveNetwork
from coordinator.membership import Membership
from coordinator.messages import (
    COORDINATOR,
    Ask,
    Changed,
    Commit,
    CoordinatorMessage,
    Failed,
    Heartbeat,
    Join,
    Leave,
    Ready,
    Refused,
    Saved,
    Stop,
    Suspect,
    Vote,
    shorten,
)
from coordinator.phase import Phase as Phase
from coordinator.plan import RunPlan
from coordinator.recovery import GOING, Recovery
from coordinator.rounds import RoundState
from coordinator.state import Ending, SavedState
from coordinator.steps import Steps
from coordinator.table import Table, arrive, row
from netem.errors import ProtocolError
from netem.names import plain


class Run:
    """One run, from the first node that joins to the last that leaves. Times are seconds of a monotonic clock. Raises
    `ConfigError` where the chunks cannot be assigned, or sites have stages."""

    def __init__(self, config: CoordinatorConfig, plan: RunPlan, now_s: float) -> None:
        whole = assign(plan.chunks, config.nodes, config.assignment, config.chunks_per_node)
        self.membership = Membership(config, plan.run_name, plan.config_digest)
        self.phase = Phase.JOINING
        self._config = config
        self._plan = plan
        self._steps = Steps(plan, config.step_timeout_s)
        self._generations = Generations(config, plan, self.membership, self._steps, whole)
        self._live = LiveNetwork(plan.schedule)
        self._recovery = Recovery(config, plan, self.membership, self._generations, self._steps, self._live)
        self._outcome = Finish(False, "")
        # The end of the rendezvous, of a pause, of the time without any progress, or of the farewells.
        self._deadline_s = now_s + config.join_timeout_s
        self._next_beat_s = now_s

    @property
    def step(self) -> int:
        """How many steps all members have done."""
        return self._steps.step

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in and return the actions that it causes, in order.

        Raises `ProtocolError`, which names the peer, where `TABLE` has no such move or the message is wrong. The caller
        then hands in `Faulted` for that peer.
        """
        peer, subject = subject_of(event)
        if isinstance(event, Received | PeerLost | Faulted) and not isinstance(subject, Join | Ask):
            if peer not in self.membership:
                return self._stranger(peer, event)
            if isinstance(event, Received):
                self.membership.hear(peer, now_s)
                if self._generations.is_stale(peer, subject):
                    return []
        before, kind = self.phase, type(subject)
        if (before, kind) not in TABLE:
            raise ProtocolError(f"{kind.__name__} while {before.value}", peer=peer)
        actions = TABLE[before, kind].move(self, peer, subject, now_s)
        arrive(TABLE, before, kind, self.phase)
        return actions

    def saved(self) -> SavedState | None:
        """What must be on disk before anything is sent that follows from it; None before the first node has joined."""
        ending = Ending(*self._outcome) if self.phase in _OVER else None
        return restart.save(self._plan, self.membership, self._generations, self._steps, self._live, ending)

    def restart(self, state: SavedState, now_s: float) -> list[Action]:
        """Go on, in a new generation, from what an earlier coordinator of this run has saved; the first call."""
        actions = restart.restore(state, self.membership, self._generations, self._steps, self._live, now_s)
        if state.ending is not None:
            return self._end(state.ending.ok, state.ending.reason, now_s)
        if self._generations.roster is not None:
            return actions + self._recovered(self._recovery.begin(now_s), now_s)
        return actions + (self._begin(now_s) if self.membership.complete else [])

    def excuse(self, stood_s: float, now_s: float) -> list[Action]:
        """This process stood still for so long, and heard nobody: no member is silent or late for that."""
        self._deadline_s += stood_s
        return self._recovery.excuse(stood_s, now_s)

    def _stranger(self, peer: str, event: Received | PeerLost | Faulted) -> list[Action]:
        """Something of a peer that is no member. One that was a member may not know that yet, and is told."""
        if isinstance(event, PeerLost):
            return [Forget(peer)]
        told = self._generations.eviction(peer)
        speaks = isinstance(event, Received) and not isinstance(event.message, Leave | Failed)
        return [Send(peer, told)] if told is not None and speaks else []

    # The moves. Each takes the peer, the event's subject and the time, and returns actions.

    def _join(self, peer: str, join: Join, now_s: float) -> list[Action]:
        if (reason := self.membership.refusal(peer, join)) is not None:
            return [Send(peer, Refused(reason=shorten(reason), address=join.address))]
        if not self.membership.admit(peer, join, now_s):
            return []  # it repeated its request because our answer was slow
        actions: list[Action] = [Send(peer, self.membership.welcome(join))]
        return actions + (self._begin(now_s) if self.membership.complete else [])

    def _join_later(self, peer: str, join: Join, now_s: float) -> list[Action]:
        """A node joins a run that goes on: it waits for the next generation."""
        if (reason := self.membership.refusal(peer, join)) is not None:
            again_s = self.membership.again_s(join, now_s)
            return [Send(peer, Refused(reason=shorten(reason), address=join.address, again_s=again_s))]
        if not self.membership.admit(peer, join, now_s):
            return []
        self._generations.forgive(peer)
        actions: list[Action] = [Send(peer, self.membership.welcome(join))]
        return actions + (self._recovered(self._recovery.begin(now_s), now_s) if self.phase is Phase.PAUSED else [])

    def _join_late(self, peer: str, join: Join, now_s: float) -> list[Action]:
        if peer in self.membership:
            return []
        if (reason := self.membership.refusal(peer, join)) is None:
            reason = f"{self.phase.value} at step {self.step}; nobody can join any more"
        return [Send(peer, Refused(reason=shorten(reason), address=join.address))]

    def _depart(self, peer: str, message: Leave | Failed | PeerLost, now_s: float) -> list[Action]:
        """A member leaves before all have joined: its place is free again."""
        return self._drop(peer, now_s, message)

    def _ready(self, peer: str, ready: Ready, now_s: float) -> list[Action]:
        full = self._steps.ready(peer, ready, now_s)
        self._generations.has_come_in(peer)
        self._progress(now_s)
        if not full:
            return []
        if (disagreement := self._steps.barrier.disagreement()) is not None:
            return self._recovered(self._recovery.heal(disagreement, now_s), now_s)
        actions: list[Action] = []
        metrics = self._steps.barrier.metrics()
        if counts := self._steps.count():
            actions.append(Record(self.step, self._generations.number, metrics, self._live.news(now_s)))
        actions += self._recovery.tell_faults(self._generations.describe(), now_s)
        if self._steps.finished:
            return actions + self._end(True, "", now_s)
        actions += self._recovery.judge_paces(metrics, now_s) if counts else []
        if self._recovery.wants_generation(now_s):
            return actions + self._recovered(self._recovery.begin(now_s), now_s)
        go = self._steps.go(self._recovery.saves.oldest_kept)
        self._enter_step()
        return actions + self._tell(go)

    def _vote(self, peer: str, vote: Vote, now_s: float) -> list[Action]:
        state = self._steps.vote(peer, vote, now_s)
        self._progress(now_s)
        if state is RoundState.COMMITTED:
            commit = Commit(round_id=self._steps.commit())
            self._enter_step()
            return self._tell(commit)
        if state is RoundState.ABORTED:
            return self._recovered(self._recovery.repeat(self._steps.why_aborted, now_s), now_s)
        return []

    def _save(self, peer: str, saved: Saved, now_s: float) -> list[Action]:
        if not self._plan.start_step <= saved.step <= self.step + 1:
            raise ProtocolError(f"saved step {saved.step} where the run is at step {self.step}", peer=peer)
        self._progress(now_s)
        if saved.reason:
            return [CheckpointFailed(saved.step, f"{plain(peer)}: {saved.reason}")]
        members = self._generations.members
        complete = self._recovery.saves.note(peer, saved.step, members)
        return [CheckpointComplete(saved.step, self._generations.nodes)] if complete else []

    def _suspect(self, peer: str, suspect: Suspect, now_s: float) -> list[Action]:
        if suspect.peer in self._generations.members and suspect.peer != peer:
            self._recovery.suspicions.note(peer, suspect.peer, f"{plain(peer)}: {suspect.reason}", now_s)
        return []

    def _ask(self, peer: str, ask: Ask, now_s: float) -> list[Action]:
        """A person outside the run asks about the network, or for a change of it."""
        if (reason := self.membership.refusal_to_talk("this command", ask)) is not None:
            return [Send(peer, Refused(reason=shorten(reason)))]
        members = {member: plain(member) for member in self._generations.members}
        return self._live.ask(peer, ask, members, self.step, now_s)

    def _ask_late(self, peer: str, ask: Ask, now_s: float) -> list[Action]:
        reason = self.membership.refusal_to_talk("this command", ask) or f"{self.phase.value}; nothing can be changed"
        return [Send(peer, Refused(reason=shorten(reason)))]

    def _changed(self, peer: str, changed: Changed, now_s: float) -> list[Action]:
        return self._live.confirm(peer, changed.number, self.step, now_s)

    def _lose(self, peer: str, message: Leave | Failed | PeerLost | Faulted, now_s: float) -> list[Action]:
        if isinstance(message, Faulted):
            return self._recovered(self._recovery.evict([peer], message.reason, now_s), now_s)
        kind, verb = GOING[type(message)]
        why = f": {message.reason}" if message.reason else ""
        reason = f"{self.membership.describe([peer])} {verb}{why}"
        if isinstance(message, Failed) and message.ends_run:
            return self._drop(peer, now_s, message) + self._end(False, reason, now_s)
        return self._recovered(self._recovery.lose([peer], kind, reason, now_s), now_s)

    def _farewell(self, peer: str, message: Leave | Failed | PeerLost | Faulted, now_s: float) -> list[Action]:
        return self._drop(peer, now_s, message) + self._finish_if_alone()

    def _expel(self, peer: str, fault: Faulted, now_s: float) -> list[Action]:
        """A member broke the protocol before all had joined: it is told why and removed, and the others wait on."""
        self.membership.remove(peer, now_s)
        return [Send(peer, Stop(ok=False, reason=shorten(fault.reason)))]

    def _cancel(self, peer: str, cancelled: Cancelled, now_s: float) -> list[Action]:
        return self._end(False, cancelled.reason, now_s)

    def _nothing(self, peer: str, subject: object, now_s: float) -> list[Action]:
        """A sign of life, which `handle` has noted, or a message that was sent before its sender heard of the end."""
        return []

    def _tick_joining(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s)
        for silent in self.membership.silent(now_s):
            actions += self._drop(silent, now_s)
        # Those that are all here may take as long to prepare their data as steps may take.
        more_s = self._config.progress_timeout_s if self.membership.full else 0.0
        if now_s > self._deadline_s + more_s:
            waited_s = self._config.join_timeout_s + more_s
            actions += self._end(False, f"after {waited_s:g} s {self.membership.waiting_text()}", now_s)
        return actions

    def _tick_running(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s) + self._live.tick(self.step, now_s)
        if silent := self.membership.silent(now_s):
            return actions + self._recovered(self._recovery.lose_silent(silent, now_s), now_s)
        if self.phase is Phase.PAUSED:
            return actions + self._tick_paused(now_s)
        if judged := self._recovery.judge_late(now_s):
            return actions + self._recovered(judged, now_s)
        if now_s > self._deadline_s:
            what = f"no node made progress for {self._config.progress_timeout_s:g} s"
            actions += self._end(False, f"step {self._steps.barrier.step}: {what}", now_s)
        return actions

    def _tick_paused(self, now_s: float) -> list[Action]:
        late = now_s > self._deadline_s and not self._generations.is_enough(now_s)
        return self._recovered(self._recovery.paused_too_long() if late else self._recovery.begin(now_s), now_s)

    def _tick_stopping(self, peer: str, tick: Tick, now_s: float) -> list[Action]:
        actions = self._beat(now_s)
        for silent in self.membership.silent(now_s):
            actions += self._drop(silent, now_s)
        if now_s > self._deadline_s:
            self.phase = Phase.FINISHED
            return [*actions, self._outcome]
        return actions + self._finish_if_alone()

    def _begin(self, now_s: float) -> list[Action]:
        """All have joined."""
        if (reason := self._plan.schedule.unmatched([*self.membership.names, COORDINATOR])) is not None:
            return self._end(False, reason, now_s)
        return self._recovered(self._recovery.begin(now_s), now_s) + self._live.begin(now_s)

    def _recovered(self, actions: list[Action], now_s: float) -> list[Action]:
        """After a call of `_recovery`: take up what it has led to."""
        if self._recovery.hopeless:
            return actions + self._end(False, self._recovery.hopeless, now_s)
        paused = self.phase is Phase.PAUSED
        self._enter_step()
        if self.phase is not Phase.PAUSED:
            self._progress(now_s)
        elif not paused:
            self._deadline_s = now_s + self._config.join_timeout_s
        return actions

    def _enter_step(self) -> None:
        if not self._generations.is_open:
            self.phase = Phase.PAUSED
        else:
            self.phase = Phase.ROUND if self._steps.in_round else Phase.BARRIER

    def _drop(self, peer: str, now_s: float, message: object = None) -> list[Action]:
        """Remove a member. One that said that it leaves is not forgotten yet: it waits for an acknowledgement."""
        self.membership.remove(peer, now_s)
        return [] if isinstance(message, Leave | Failed) else [Forget(peer)]

    def _end(self, ok: bool, reason: str, now_s: float) -> list[Action]:
        """Tell all that the run is over, then wait for their farewells, for at most the heartbeat timeout."""
        told = self._recovery.tell_faults("the run ends", now_s)
        if not ok and self._generations.roster:
            reason = f"{reason}; the last complete step is {self.step}"
        self.phase = Phase.STOPPING
        self._outcome = Finish(ok, reason)
        self._deadline_s = now_s + self._config.heartbeat_timeout_s
        answers = self._live.tick(self.step, now_s, ends=True)
        return [*told, *self._broadcast(Stop(ok=ok, reason=shorten(reason))), *answers, *self._finish_if_alone()]

    def _finish_if_alone(self) -> list[Action]:
        self.phase = self.phase if len(self.membership) else Phase.FINISHED
        return [] if len(self.membership) else [self._outcome]

    def _tell(self, message: CoordinatorMessage) -> list[Action]:
        """Tell the members of this generation."""
        return [Send(peer, message) for peer in self._generations.members]

    def _broadcast(self, message: CoordinatorMessage) -> list[Action]:
        """Tell all, also those who wait for the next generation."""
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
_TRAINING = (Phase.BARRIER, Phase.ROUND)
_RUNNING = (*_TRAINING, Phase.PAUSED)
_OVER = (Phase.STOPPING, Phase.FINISHED)
_GOING_ON = (Phase.BARRIER, Phase.PAUSED)  # a generation has ended
_LOSSES = (Leave, Failed, PeerLost, Faulted)
_REPORTS: Final = ((Saved, Run._save), (Suspect, Run._suspect))
_WORDS: Final = ((Ask, Run._ask), (Heartbeat, Run._nothing), (Changed, Run._changed))
TABLE: Final[Table[Phase, Move]] = {
    (Phase.JOINING, Join): row(Run._join, Phase.JOINING, Phase.BARRIER, Phase.STOPPING),
    (Phase.JOINING, Ask): row(Run._ask, Phase.JOINING),
    (Phase.JOINING, Heartbeat): row(Run._nothing, Phase.JOINING),
    **{(Phase.JOINING, kind): row(Run._depart, Phase.JOINING) for kind in (Leave, Failed, PeerLost)},
    (Phase.JOINING, Faulted): row(Run._expel, Phase.JOINING),
    (Phase.JOINING, Cancelled): row(Run._cancel, *_OVER),
    (Phase.JOINING, Tick): row(Run._tick_joining, Phase.JOINING, *_OVER),
    # The nodes compute a step that has no averaging round, or wait for the next barrier.
    (Phase.BARRIER, Ready): row(Run._ready, *_RUNNING, Phase.STOPPING),
    # The nodes compute a step that has averaging rounds, and vote on the first that is still open.
    (Phase.ROUND, Vote): row(Run._vote, *_TRAINING, Phase.STOPPING),
    # In both; and while there are too few nodes, when nothing of the generation before counts any more.
    **{(phase, kind): row(move, phase) for phase in _TRAINING for kind, move in _REPORTS},
    (Phase.PAUSED, Join): row(Run._join_later, Phase.BARRIER, Phase.PAUSED),
    **{(phase, Join): row(Run._join_later, phase) for phase in _TRAINING},
    **{(phase, kind): row(move, phase) for phase in _RUNNING for kind, move in _WORDS},
    **{(phase, kind): row(Run._lose, phase, *_GOING_ON, *_OVER) for phase in _TRAINING for kind in _LOSSES},
    **{(Phase.PAUSED, kind): row(Run._lose, Phase.PAUSED, *_OVER) for kind in _LOSSES},
    **{(phase, Cancelled): row(Run._cancel, Phase.STOPPING) for phase in _RUNNING},
    **{(phase, Tick): row(Run._tick_running, phase, *_GOING_ON, *_OVER) for phase in _RUNNING},
    # All have been told of the end. What they sent before they heard of it is still legal.
    (Phase.STOPPING, Join): row(Run._join_late, Phase.STOPPING),
    (Phase.STOPPING, Ask): row(Run._ask_late, Phase.STOPPING),
    **{
        (Phase.STOPPING, kind): row(Run._nothing, Phase.STOPPING)
        for kind in (Heartbeat, Ready, Vote, Suspect, Changed, Cancelled)
    },
    (Phase.STOPPING, Saved): row(Run._save, Phase.STOPPING),
    **{(Phase.STOPPING, kind): row(Run._farewell, *_OVER) for kind in _LOSSES},
    (Phase.STOPPING, Tick): row(Run._tick_stopping, *_OVER),
    (Phase.FINISHED, Join): row(Run._join_late, Phase.FINISHED),
    (Phase.FINISHED, Ask): row(Run._ask_late, Phase.FINISHED),
    **{(Phase.FINISHED, kind): row(Run._nothing, Phase.FINISHED) for kind in (Heartbeat, Cancelled, Tick)},
}
