"""One averaging round: it happens on all members or on none. A small machine without I/O.

The members exchange the bytes among themselves; here only their votes are counted. All in favour with equal
digests commits; one against, one different, or one late aborts, and the reason names who. Two-phase commit
without a log: the coordinator's word is final, and a member that cannot hear it ends its run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from coordinator.barrier import differing
from coordinator.messages import Round, Vote
from netem.errors import ProtocolError
from netem.names import plain


class RoundState(enum.Enum):
    """OPEN while votes are out; then one of the two others, for good."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Ballot:
    """The votes of `peers` on one round. The deadline runs from the first vote."""

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
