"""Averaging rounds: each one happens on all members or on none. Small machines without I/O.

The members exchange the data among themselves; the coordinator only counts their votes (`Ballot`). A round is committed
where all vote for it with equal digests. One vote against, one other digest or one late vote aborts it, and the reason
names the member. This is two-phase commit without a log: the coordinator's decision is final, and a member that does
not hear it ends its run. `StepRounds` numbers the rounds of a step and opens one after another. A round may be named in
an earlier step than the one in which the members vote on it: its data travels in between.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence

from coordinator.barrier import differing
from coordinator.messages import Round, Vote
from netem.errors import ProtocolError
from netem.names import plain


class RoundState(enum.Enum):
    """OPEN while votes are missing; then one of the two others, for good."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Ballot:
    """The votes of `peers` on one round. All must vote within `timeout_s` of the first vote."""

    def __init__(self, peers: Iterable[str], round_: Round, step: int, timeout_s: float) -> None:
        self.round = round_
        self.state = RoundState.OPEN
        self.reason = ""
        self._where = f"step {step}, averaging of {round_.kind}"
        self._peers = list(peers)
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

    def tick(self, now_s: float) -> None:
        """Abort once the deadline has passed, naming those who have not voted."""
        if self.state is RoundState.OPEN and now_s > self._deadline_s:
            late = ", ".join(plain(peer) for peer in self._peers if peer not in self._votes)
            self._abort(f"{late} did not finish within {self._timeout_s:g} s of the first")

    def _close(self) -> None:
        text = differing({plain(peer): vote.digest for peer, vote in self._votes.items()})
        if text is None:
            self.state = RoundState.COMMITTED
        else:
            self._abort(f"the results differ: {text}")

    def _abort(self, why: str) -> None:
        self.state = RoundState.ABORTED
        self.reason = f"{self._where}: {why}"


class StepRounds:
    """The averaging rounds of one step after another. Their numbers rise through the whole run.

    `ballot` is the one that was opened last.
    """

    ballot: Ballot

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._next_id = 0
        self._waiting: deque[Round] = deque()
        self._begun: dict[str, Round] = {}

    def begin(self, kinds: Sequence[str], weights: Sequence[float]) -> list[Round]:
        """Rounds that begin to travel with the next step; `weights` are by rank. They are opened in the step whose
        `number` says that they end there."""
        rounds = self._named(kinds, weights)
        self._begun |= {round_.kind: round_ for round_ in rounds}
        return rounds

    def number(self, kinds: Sequence[str], weights: Sequence[float], ends: Sequence[str] = ()) -> list[Round]:
        """The rounds of the next step, in order: new ones, then those of `ends` that have begun to travel. None of them
        is open yet. A round that never began, because the run was resumed after that step, does not end either."""
        assert not self._waiting
        rounds = self._named(kinds, weights) + [self._begun.pop(kind) for kind in ends if kind in self._begun]
        self._waiting.extend(rounds)
        return rounds

    def _named(self, kinds: Sequence[str], weights: Sequence[float]) -> list[Round]:
        rounds = [Round(round_id=self._next_id + i, kind=kind, weights=list(weights)) for i, kind in enumerate(kinds)]
        self._next_id += len(rounds)
        return rounds

    def open_next(self, peers: Iterable[str], step: int) -> bool:
        """Open the next round of `step`. False where none is left."""
        if not self._waiting:
            return False
        self.ballot = Ballot(peers, self._waiting.popleft(), step, self._timeout_s)
        return True

    def vote(self, peer: str, vote: Vote, now_s: float) -> None:
        """Count a vote on the open round. Raises `ProtocolError` as `Ballot.vote` does."""
        self.ballot.vote(peer, vote, now_s)

    def tick(self, now_s: float) -> RoundState:
        """Let time pass for the open round, and return its state."""
        self.ballot.tick(now_s)
        return self.ballot.state
