"""The steps of a run through all its generations: barriers, rounds, and which steps count. A machine without I/O.

A step counts once all members hold it: at the barrier after it, or at its round `TAKE`, if it has one. What follows
that round, averaged weights, a checkpoint and an evaluation, is the step's tail. Where the membership changes, a step
that does not count yet is done again, and of one that does only the tail. `run` asks this machine and tells the
members.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.barrier import Barrier, BarrierState
from coordinator.messages import Go, Ready, Vote
from coordinator.plan import TAKE, RunPlan
from coordinator.rounds import RoundState, StepRounds


class Steps:
    """`step` is the number of steps that all members have taken."""

    def __init__(self, plan: RunPlan, timeout_s: float) -> None:
        self.step = plan.start_step
        self.barrier = Barrier((), self.step, timeout_s)
        self.rounds = StepRounds(timeout_s)
        self._plan = plan
        self._timeout_s = timeout_s
        self._members: list[str] = []
        self._weights: list[float] = []
        self._columns = 1
        self._generation = 0
        self._doing = self.step  # the steps before the one that was begun last
        self._under_way = False
        self.committed = -1  # the last round that has happened
        self._tail: list[str] | None = None  # kinds of rounds that the last step still needs, once it counts

    @property
    def in_round(self) -> bool:
        """Whether the members vote on a round now; otherwise the next barrier is awaited."""
        return self.rounds.ballot is not None

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step, and nothing of it is left to do."""
        return self.step >= self._plan.steps and self._tail is None

    @property
    def tail(self) -> list[str] | None:
        """The kinds of rounds that the last step still needs, where it counts and is not finished; else None."""
        return None if self._tail is None else list(self._tail)

    def restore(self, step: int, tail: list[str] | None, next_round: int, committed: int) -> None:
        """Where the run was when the coordinator was killed. A generation is still to begin."""
        self.step = self._doing = step
        self._tail = tail
        self.rounds.next_id = next_round
        self.committed = committed

    @property
    def travels(self) -> bool:
        """Whether a round is under way that was begun in an earlier step."""
        return self.rounds.travels

    @property
    def alone(self) -> int:
        """For how many of the steps that count each member has changed its weights alone. An averaging that belongs to
        the last of them, and has not happened, does not count."""
        owed = self._tail is not None and (bool(self._tail) or self.rounds.ballot is not None)
        return self._plan.lost_with(self.step - 1) + 1 if owed else self._plan.lost_with(self.step)

    def begin(
        self, members: Sequence[str], weights: Sequence[float], generation: int, timeout_s: float, columns: int = 1
    ) -> None:
        """A generation begins: its members, site by site where these have several `columns`, and the weights of nodes
        in an average by rank. They are ready within `timeout_s` of each other."""
        self._members, self._weights, self._generation = list(members), list(weights), generation
        self._columns = columns
        self.rounds.drop()
        self._under_way = False
        self.barrier = Barrier(members, self.step, timeout_s, columns)

    def ready(self, peer: str, ready: Ready, now_s: float) -> bool:
        """Note that a member is ready; whether all are. Raises `ProtocolError` as `Barrier.ready` does."""
        self.barrier.ready(peer, ready, now_s)
        return self.barrier.state is BarrierState.FULL

    def count(self) -> bool:
        """All members are ready and agree: what they hold counts. Whether a step was ended by that; otherwise they have
        only begun a generation."""
        ended, self._under_way = self._under_way, False
        self.step = self.barrier.step
        if ended:
            self._tail = None
        return ended

    def go(self, keep_from: int) -> Go:
        """Begin the next step, or the tail of the last one that is left. Checkpoints before `keep_from` may go."""
        plan, step, weights = self._plan, self.step, self._weights
        self._doing = step
        self._under_way = True
        tail = self._tail is not None
        if self._tail is not None:
            begins, rounds = [], self.rounds.number(self._tail, weights)
        else:
            begins = self.rounds.begin(plan.begins_for(step), weights)
            rounds = self.rounds.number(plan.rounds_for(step), weights, plan.ends_for(step))
        self._open()
        return Go(
            step=step,
            generation=self._generation,
            cursor=plan.cursor_at(step),
            rounds=rounds,
            begins=begins,
            keep_from=keep_from,
            tail=tail,
        )

    def vote(self, peer: str, vote: Vote, now_s: float) -> RoundState:
        """Count a vote on the open round. Raises `ProtocolError` as `Ballot.vote` does."""
        ballot = self.rounds.ballot
        assert ballot is not None
        ballot.vote(peer, vote, now_s)
        return ballot.state

    @property
    def why_aborted(self) -> str:
        """Why the round that is open has not happened."""
        return self.rounds.ballot.reason if self.rounds.ballot else ""

    def commit(self) -> int:
        """All members have voted for the round, and agree: it happens, and the next one is open. Its number."""
        assert self.rounds.ballot is not None
        done = self.rounds.ballot.round
        self.committed = done.round_id
        if done.kind == TAKE:
            self.step = self._doing + 1
            self._tail = self.rounds.left
        elif self._tail is not None and done.kind in self._tail:
            self._tail.remove(done.kind)
        self._open()
        return done.round_id

    def late(self, now_s: float) -> tuple[Sequence[str], str]:
        """Members whose time for the barrier or the vote has passed, and what they are late with."""
        ballot = self.rounds.ballot
        return self.barrier.late(now_s) if ballot is None else ballot.late(now_s)

    def extend(self, seconds: float) -> None:
        """Give the members so much longer to be ready, or to vote."""
        (self.rounds.ballot or self.barrier).extend(seconds)

    def _open(self) -> None:
        """Open the step's next round; where none is left, wait for the barrier after the step."""
        if not self.rounds.open_next(self._members, self._doing, self._columns):
            number = self.step if self._tail is not None else self.step + 1
            self.barrier = Barrier(self._members, number, self._timeout_s, self._columns)
