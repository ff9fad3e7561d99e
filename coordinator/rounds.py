"""Averaging rounds: each one happens on all members or on none. Small machines without I/O.

The members exchange the data among themselves; the coordinator only counts their votes (`Ballot`). A round is committed
where all vote for it with equal digests. One vote against, one other digest or a lost member aborts it, and the
generation with it. This is two-phase commit without a log: the coordinator's decision is final. A member that has voted
hears of a commit before it hears of a later generation, or else the round has happened nowhere. `StepRounds` numbers
the rounds of a step and opens one after another. A round may be named in an earlier step than the one in which the
members vote on it: its data travels in between.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence

from coordinator.barrier import by_column, differing
from coordinator.messages import Round, Vote
from netem.errors import ProtocolError
from netem.names import plain


class RoundState(enum.Enum):
    """OPEN while votes are missing; then one of the two others, for good."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Ballot:
    """The votes of `peers` on one round. All must vote within `timeout_s` of the first vote. `columns` are as in
    `Barrier`: those of one column must have the same result."""

    def __init__(self, peers: Iterable[str], round_: Round, step: int, timeout_s: float, columns: int = 1) -> None:
        self.round = round_
        self.state = RoundState.OPEN
        self.reason = ""
        self._where = f"step {step}, averaging of {round_.kind}"
        self._peers = list(peers)
        self._columns = columns
        self._timeout_s = timeout_s
        self._deadline_s = float("inf")
        self._votes: dict[str, Vote] = {}

    def vote(self, peer: str, vote: Vote, now_s: float) -> None:
        """Count a vote. Raises `ProtocolError` for a second one, or one on another round."""
        if vote.round_id != self.round.round_id:
            raise ProtocolError(f"vote on round {vote.round_id}, open is {self.round.round_id}", peer=peer)
        if peer in self._votes:
            raise ProtocolError(f"two votes on round {vote.round_id}", peer=peer)
        assert self.state is RoundState.OPEN
        if not self._votes:
            self._deadline_s = now_s + self._timeout_s
        self._votes[peer] = vote
        if not vote.ok:
            self._abort(f"{plain(peer)} could not take part: {vote.reason or 'no reason given'}")
        elif len(self._votes) == len(self._peers):
            self._close()

    def late(self, now_s: float) -> tuple[list[str], str]:
        """Once the deadline has passed, the members that have not voted, and with what they are late; none before."""
        if self.state is not RoundState.OPEN or now_s <= self._deadline_s:
            return [], ""
        late = [peer for peer in self._peers if peer not in self._votes]
        return late, f"{self._where}: no vote within {self._timeout_s:g} s of the first"

    def extend(self, seconds: float) -> None:
        """Give the members so much longer."""
        self._deadline_s += seconds

    def _close(self) -> None:
        for column in by_column(self._peers, self._columns):
            text = differing({plain(peer): self._votes[peer].digest for peer in column})
            if text is not None:
                self._abort(f"the results differ: {text}")
                return
        self.state = RoundState.COMMITTED

    def _abort(self, why: str) -> None:
        self.state = RoundState.ABORTED
        self.reason = f"{self._where}: {why}"


class StepRounds:
    """The averaging rounds of one step after another. Their numbers rise through the whole run.

    `ballot` is the one that is open; None where no round is.
    """

    def __init__(self, timeout_s: float) -> None:
        self.ballot: Ballot | None = None
        self._timeout_s = timeout_s
        self.next_id = 0
        self._waiting: deque[Round] = deque()
        self._begun: dict[str, Round] = {}
        self._ending: frozenset[int] = frozenset()

    @property
    def travels(self) -> bool:
        """Whether a round has begun to travel and not come to its end."""
        return bool(self._begun)

    @property
    def left(self) -> list[str]:
        """The kinds of the step's rounds that are not open yet, in order, without those that were begun before it."""
        return [round_.kind for round_ in self._waiting if round_.round_id not in self._ending]

    def drop(self) -> None:
        """The generation is over, and with it every round that is open, waits or travels."""
        self.ballot = None
        self._waiting.clear()
        self._begun.clear()

    def begin(self, kinds: Sequence[str], weights: Sequence[float]) -> list[Round]:
        """Rounds that begin to travel with the next step; `weights` are by rank. They are opened in the step whose
        `number` says that they end there."""
        rounds = self._named(kinds, weights)
        self._begun |= {round_.kind: round_ for round_ in rounds}
        return rounds

    def number(self, kinds: Sequence[str], weights: Sequence[float], ends: Sequence[str] = ()) -> list[Round]:
        """The rounds of the next step, in order: new ones, then those of `ends` that have begun to travel. None of them
        is open yet. A round that never began, because the run was resumed or the membership changed after that step,
        does not end either."""
        assert not self._waiting
        ending = [self._begun.pop(kind) for kind in ends if kind in self._begun]
        self._ending = frozenset(round_.round_id for round_ in ending)
        rounds = self._named(kinds, weights) + ending
        self._waiting.extend(rounds)
        return rounds

    def _named(self, kinds: Sequence[str], weights: Sequence[float]) -> list[Round]:
        rounds = [Round(round_id=self.next_id + i, kind=kind, weights=list(weights)) for i, kind in enumerate(kinds)]
        self.next_id += len(rounds)
        return rounds

    def open_next(self, peers: Iterable[str], step: int, columns: int = 1) -> bool:
        """Open the next round of `step`. False where none is left."""
        ballot = Ballot(peers, self._waiting.popleft(), step, self._timeout_s, columns) if self._waiting else None
        self.ballot = ballot
        return self.ballot is not None
