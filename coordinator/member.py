"""The node's side of the protocol: one machine without I/O, two tables.

`send` is what the trainer wants to say, `receive` what the coordinator said, `tick` the time passing; what
is not in `LOCAL` or `REMOTE` is a `ProtocolError` (its `peer` is "" where this side is at fault). A member
goes NEW → JOINING → WAITING → RUNNING ⇄ READY, RUNNING ⇄ VOTED, and from anywhere to DONE → GONE. It also
finds a silent coordinator. The other side is `run`; `client` adds threads and a clock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from coordinator.assignment import Assignment
from coordinator.config import CoordinatorConfig
from coordinator.messages import (
    COORDINATOR,
    Abort,
    Alter,
    Changed,
    Commit,
    CoordinatorMessage,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    NodeMessage,
    Ready,
    Refused,
    Roster,
    Saved,
    Stop,
    Vote,
    Welcome,
)
from netem.errors import ConfigError, ProtocolError
from netem.names import plain
from netem.schedule import Timed


class State(enum.Enum):
    """Where this node is."""

    NEW = "not joined yet"
    JOINING = "asking to join"
    WAITING = "waiting for the other nodes"
    RUNNING = "computing"
    READY = "waiting for the next step"
    VOTED = "waiting for the verdict of a round"
    DONE = "the run is over"
    GONE = "the coordinator has been left"


class End(enum.Enum):
    """How a member's run ended."""

    FINISHED = "finished"  # the last step is done
    ABORTED = "aborted"  # someone's loss or decision
    REFUSED = "refused"  # never let in
    UNREACHABLE = "unreachable"  # never heard of the coordinator
    LEFT = "left"  # by our own wish


class Ending(NamedTuple):
    """How and why it ended."""

    how: End
    reason: str


# In these states the coordinator is expected to be heard, and to hear us.
_LIVE = frozenset({State.WAITING, State.RUNNING, State.READY, State.VOTED})


class Member:
    """One node in one run. `now_s` is any clock that never runs backwards.

    `rank` and `roster` are known from RUNNING on, and `began_s`, when the roster came; `go` is the step last begun;
    `committed` the last round that counted; `changes` are the network's by command; `ending` is set from DONE on.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.state = State.NEW
        self.rank = -1
        self.roster: Roster | None = None
        self.began_s = 0.0
        self.changes: tuple[Timed, ...] = ()
        self.go: Go | None = None
        self.committed: int | None = None
        self.ending: Ending | None = None
        self._config = config
        self._join: Join | None = None
        self._ready_step = -1
        self._rounds_left: list[int] = []
        self._heard_s = 0.0
        self._next_beat_s = 0.0
        self._interval_s = config.heartbeat_interval_s
        self._timeout_s = config.heartbeat_timeout_s

    def send(self, message: NodeMessage, now_s: float) -> list[NodeMessage]:
        """Say something; gives what goes on the wire (nothing where a farewell finds nobody to hear it)."""
        move = LOCAL.get((self.state, type(message)))
        if move is None:
            raise ProtocolError(f"{type(message).__name__} while {self.state.value}")
        return move(self, message, now_s)

    def receive(self, message: CoordinatorMessage, now_s: float) -> None:
        """Take in what the coordinator said. Raises `ProtocolError` where it may not say that now."""
        move = REMOTE.get((self.state, type(message)))
        if move is None:
            raise self._wrong(f"{type(message).__name__} while this node is {self.state.value}")
        move(self, message, now_s)
        self._heard_s = max(self._heard_s, now_s)

    def tick(self, now_s: float) -> list[NodeMessage]:
        """Let time pass: gives a heartbeat where one is due; ends the run where the coordinator is silent."""
        quiet_s = now_s - self._heard_s
        if self.state is State.JOINING and quiet_s > self._config.join_timeout_s:
            self._end(End.UNREACHABLE, f"no answer from the coordinator within {self._config.join_timeout_s:g} s")
        if self.state in _LIVE and quiet_s > self._timeout_s:
            self._end(End.ABORTED, f"the coordinator was lost: silent for {self._timeout_s:g} s")
        if self.state not in _LIVE or now_s < self._next_beat_s:
            return []
        self._next_beat_s = now_s + self._interval_s
        return [Heartbeat()]

    def lose(self, reason: str) -> None:
        """End the run for a cause on this side: the transport broke, the coordinator spoke nonsense."""
        if self.state not in (State.DONE, State.GONE):
            self._end(End.ABORTED, reason)

    # Local moves: (message, time) → what goes on the wire.

    def _ask(self, join: Join, now_s: float) -> list[NodeMessage]:
        self.state = State.JOINING
        self._join = join
        self._heard_s = now_s
        return [join]

    def _report(self, ready: Ready, now_s: float) -> list[NodeMessage]:
        if self._rounds_left:
            raise ProtocolError(f"ready for step {ready.step} before a vote on round {self._rounds_left[0]}")
        if self.go is not None and ready.step != self.go.step + 1:
            raise ProtocolError(f"ready for step {ready.step} after step {self.go.step}")
        self.state = State.READY
        self._ready_step = ready.step
        return [ready]

    def _cast(self, vote: Vote, now_s: float) -> list[NodeMessage]:
        if not self._rounds_left or vote.round_id != self._rounds_left[0]:
            expected = f"round {self._rounds_left[0]}" if self._rounds_left else "no round"
            raise ProtocolError(f"vote on round {vote.round_id}, open is {expected}")
        self.state = State.VOTED
        return [vote]

    def _pass(self, message: Saved | Changed, now_s: float) -> list[NodeMessage]:
        return [message]

    def _go_away(self, message: Leave | Failed, now_s: float) -> list[NodeMessage]:
        self._end(End.LEFT, message.reason or "left")
        self.state = State.GONE
        return [message]

    def _say_farewell(self, message: Leave | Failed, now_s: float) -> list[NodeMessage]:
        self.state = State.GONE
        return [message]

    def _say_nothing(self, message: NodeMessage, now_s: float) -> list[NodeMessage]:
        return []

    # Remote moves.

    def _welcomed(self, welcome: Welcome, now_s: float) -> None:
        self.state = State.WAITING
        self._interval_s = welcome.heartbeat_interval_s
        self._timeout_s = welcome.heartbeat_timeout_s
        self._next_beat_s = now_s

    def _refused(self, refused: Refused, now_s: float) -> None:
        if self._is_mine(refused):
            self._end(End.REFUSED, refused.reason)
            self.state = State.GONE

    def _refused_other(self, refused: Refused, now_s: float) -> None:
        if self._is_mine(refused):
            raise self._wrong("Refused after Welcome")

    def _enrolled(self, roster: Roster, now_s: float) -> None:
        assert self._join is not None
        ranks = {entry.name: entry.rank for entry in roster.members}
        if sorted(ranks.values()) != list(range(len(roster.members))):
            raise self._wrong("a roster whose names or ranks are not all different")
        if len(roster.assignment) != len(roster.members):
            raise self._wrong(f"{len(roster.assignment)} ranks have chunks, {len(roster.members)} are members")
        if self._join.name not in ranks:
            raise self._wrong(f"a roster without {self._join.name}")
        if any(plain(entry.peer) != entry.name for entry in roster.members):
            raise self._wrong("a roster with a member under two names")
        try:
            Assignment(roster.assignment)
        except ConfigError as error:
            raise self._wrong(str(error)) from None
        self.rank = ranks[self._join.name]
        self.roster = roster
        self.began_s = now_s
        self.state = State.RUNNING

    def _begun(self, go: Go, now_s: float) -> None:
        assert self.roster is not None
        if go.generation != self.roster.generation:
            raise self._wrong(f"Go of generation {go.generation}, the roster is of {self.roster.generation}")
        if go.step != self._ready_step:
            raise self._wrong(f"Go for step {go.step}, this node is ready for {self._ready_step}")
        if any(len(round_.weights) != len(self.roster.members) for round_ in go.rounds):
            raise self._wrong("a round whose weights do not fit the members")
        self.go = go
        self._rounds_left = [round_.round_id for round_ in go.rounds]
        self.state = State.RUNNING

    def _agreed(self, commit: Commit, now_s: float) -> None:
        self._require_open(commit.round_id)
        self.committed = self._rounds_left.pop(0)
        self.state = State.RUNNING

    def _altered(self, alter: Alter, now_s: float) -> None:
        if alter.number != len(self.changes) + 1:
            raise self._wrong(f"change {alter.number} of the network after change {len(self.changes)}")
        self.changes = (*self.changes, alter.timed)

    def _aborted(self, abort: Abort, now_s: float) -> None:
        self._require_open(abort.round_id)
        self._end(End.ABORTED, abort.reason)

    def _stopped(self, stop: Stop, now_s: float) -> None:
        self._end(End.FINISHED if stop.ok else End.ABORTED, stop.reason)

    def _heard(self, message: CoordinatorMessage, now_s: float) -> None:
        pass  # noted by `receive`; after the end, whatever was under way means nothing any more

    def _require_open(self, round_id: int) -> None:
        if not self._rounds_left or round_id != self._rounds_left[0]:
            raise self._wrong(f"a verdict on round {round_id}, which is not open here")

    def _is_mine(self, refused: Refused) -> bool:
        assert self._join is not None
        return refused.address in ("", self._join.address)

    def _end(self, how: End, reason: str) -> None:
        self.ending = Ending(how, reason)
        # Who never answered is not waiting for a farewell.
        self.state = State.GONE if how is End.UNREACHABLE else State.DONE

    def _wrong(self, message: str) -> ProtocolError:
        generation = self.roster.generation if self.roster else None
        return ProtocolError(message, peer=COORDINATOR, generation=generation)


LOCAL: Final[Mapping[tuple[State, type], Callable[[Member, Any, float], list[NodeMessage]]]] = {
    (State.NEW, Join): Member._ask,
    (State.RUNNING, Ready): Member._report,
    (State.RUNNING, Vote): Member._cast,
    (State.RUNNING, Saved): Member._pass,
    (State.READY, Saved): Member._pass,
    (State.VOTED, Saved): Member._pass,
    (State.DONE, Saved): Member._pass,
    (State.RUNNING, Changed): Member._pass,
    (State.READY, Changed): Member._pass,
    (State.VOTED, Changed): Member._pass,
    (State.DONE, Changed): Member._say_nothing,
    (State.GONE, Changed): Member._say_nothing,
    (State.JOINING, Leave): Member._go_away,
    (State.WAITING, Leave): Member._go_away,
    (State.RUNNING, Leave): Member._go_away,
    (State.READY, Leave): Member._go_away,
    (State.VOTED, Leave): Member._go_away,
    (State.DONE, Leave): Member._say_farewell,
    (State.NEW, Leave): Member._say_nothing,
    (State.GONE, Leave): Member._say_nothing,
    (State.JOINING, Failed): Member._go_away,
    (State.WAITING, Failed): Member._go_away,
    (State.RUNNING, Failed): Member._go_away,
    (State.READY, Failed): Member._go_away,
    (State.VOTED, Failed): Member._go_away,
    (State.DONE, Failed): Member._say_farewell,
    (State.NEW, Failed): Member._say_nothing,
    (State.GONE, Failed): Member._say_nothing,
}

REMOTE: Final[Mapping[tuple[State, type], Callable[[Member, Any, float], None]]] = {
    (State.JOINING, Welcome): Member._welcomed,
    (State.JOINING, Refused): Member._refused,
    (State.JOINING, Stop): Member._stopped,
    (State.JOINING, Heartbeat): Member._heard,
    (State.WAITING, Roster): Member._enrolled,
    (State.READY, Go): Member._begun,
    (State.RUNNING, Alter): Member._altered,
    (State.READY, Alter): Member._altered,
    (State.VOTED, Alter): Member._altered,
    (State.VOTED, Commit): Member._agreed,
    # One member's vote against, or the deadline, may end a round before this node has voted.
    (State.RUNNING, Abort): Member._aborted,
    (State.VOTED, Abort): Member._aborted,
    **{(state, Stop): Member._stopped for state in _LIVE},
    **{(state, Heartbeat): Member._heard for state in _LIVE},
    # Only what was said to a namesake, with its address, is not meant for this one.
    **{(state, Refused): Member._refused_other for state in _LIVE},
    **{
        (state, kind): Member._heard
        for state in (State.DONE, State.GONE)
        for kind in (Welcome, Refused, Roster, Go, Alter, Commit, Abort, Stop, Heartbeat)
    },
}
