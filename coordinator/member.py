"""The node's side of the protocol: one machine without I/O, two tables.

The node's own events go in through `send` (what it wants to say), `tick` (time) and `lose` (the connection broke), and
the coordinator's messages through `receive`. `LOCAL` and `REMOTE` hold every legal move and the states to which it may
lead; anything else raises `ProtocolError`, whose `peer` is "" where this side is at fault. A member goes NEW →
JOINING → WAITING → RUNNING ⇄ READY, RUNNING ⇄ VOTED, and from any of them to DONE → GONE; `docs/protocol.md` has the
diagram. A later roster, of a higher generation, takes it back to RUNNING, a pause to WAITING. One that was evicted is
DONE, and may ask to join anew. `run` is the other side; `client` adds threads and a clock.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from coordinator.assignment import Assignment
from coordinator.config import CoordinatorConfig
from coordinator.events import PeerLost, Tick
from coordinator.messages import (
    COORDINATOR,
    Alter,
    Changed,
    Commit,
    CoordinatorMessage,
    Evicted,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    Saved,
    Stop,
    Suspect,
    Vote,
    Welcome,
)
from coordinator.table import Table, arrive, row
from netem.errors import ConfigError, ProtocolError
from netem.names import plain
from netem.schedule import Timed


class State(enum.Enum):
    """Where this node is in the protocol."""

    NEW = "not joined yet"
    JOINING = "asking to join"
    WAITING = "waiting for a generation to begin"
    RUNNING = "computing"
    READY = "waiting for the next step"
    VOTED = "waiting for the verdict of a round"
    DONE = "the run is over"
    GONE = "the coordinator has been left"


class End(enum.Enum):
    """How a member's run ended."""

    FINISHED = "finished"  # the last step is done
    ABORTED = "aborted"  # the coordinator or this side ended it before that
    REFUSED = "refused"  # the coordinator did not let this node in
    UNREACHABLE = "unreachable"  # the coordinator never answered
    LEFT = "left"  # this node left
    EVICTED = "evicted"  # the others go on without this node, which may join anew


class Ending(NamedTuple):
    """How and why it ended."""

    how: End
    reason: str


# In these states both sides send heartbeats.
_LIVE = (State.WAITING, State.RUNNING, State.READY, State.VOTED)
_IN_WORLD = (State.RUNNING, State.READY, State.VOTED)
_BEFORE = (State.NEW, State.JOINING, State.WAITING)
_JOINED = (State.JOINING, *_LIVE)
_OVER = (State.DONE, State.GONE)
_APART = (State.NEW, State.GONE)


class Member:
    """One node in one run. Times are seconds of a monotonic clock.

    From RUNNING on, `roster` is the latest roster, `generation` the newest generation, which may be a pause, `rank`
    this node's rank, and `began_s` the time at which the run began. `go` is the step last begun under that roster,
    `committed` the last round that was committed, `changes` the network's changes by command. `ending` is set from DONE
    on. Messages that belong to a generation leave with the roster's.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._start_over()
        self._heard_s = 0.0
        self._ticked_s = math.inf
        self._next_beat_s = 0.0
        self._interval_s = config.heartbeat_interval_s
        self._timeout_s = config.heartbeat_timeout_s

    def _start_over(self) -> None:
        self.state = State.NEW
        self.rank = -1
        self.roster: Roster | None = None
        self.generation = 0
        self.began_s = 0.0
        self.changes: tuple[Timed, ...] = ()
        self.go: Go | None = None
        self.committed: int | None = None
        self.ending: Ending | None = None
        self._join: Join | None = None
        self._ready_step = -1
        self._rounds_left: list[int] = []

    def send(self, message: NodeMessage, now_s: float) -> list[NodeMessage]:
        """Say something. Returns the messages for the wire; none where the coordinator no longer needs this one."""
        return self._act(message, now_s)

    def receive(self, message: CoordinatorMessage, now_s: float) -> None:
        """Take in a message of the coordinator. Raises `ProtocolError` where it may not come now."""
        before, kind = self.state, type(message)
        if (before, kind) not in REMOTE:
            raise self._wrong(f"{kind.__name__} while this node is {before.value}")
        REMOTE[before, kind].move(self, message, now_s)
        arrive(REMOTE, before, kind, self.state)
        self._heard_s = max(self._heard_s, now_s)

    def tick(self, now_s: float) -> list[NodeMessage]:
        """Let time pass. Returns a heartbeat where one is due, and ends the run where the coordinator is silent."""
        return self._act(Tick(), now_s)

    def lose(self, reason: str) -> None:
        """End the run for a reason on this side: the transport broke, or the coordinator broke the protocol."""
        self._act(PeerLost(COORDINATOR, reason), self._heard_s)

    def _act(self, event: NodeMessage | Tick | PeerLost, now_s: float) -> list[NodeMessage]:
        before, kind = self.state, type(event)
        if (before, kind) not in LOCAL:
            raise ProtocolError(f"{kind.__name__} while {before.value}")
        said = LOCAL[before, kind].move(self, event, now_s)
        arrive(LOCAL, before, kind, self.state)
        return said

    # Local moves. Each takes the event and the time, and returns the messages for the wire.

    def _ask(self, join: Join, now_s: float) -> list[NodeMessage]:
        if self.ending is not None and self.ending.how is not End.EVICTED:
            raise ProtocolError(f"Join while {self.state.value}")
        self._start_over()
        self.state = State.JOINING
        self._join = join
        self._heard_s = now_s
        return [join]

    def _report(self, ready: Ready, now_s: float) -> list[NodeMessage]:
        if self._rounds_left:
            raise ProtocolError(f"ready for step {ready.step} before a vote on round {self._rounds_left[0]}")
        if self.go is not None and ready.step != self.go.step + (not self.go.tail):
            raise ProtocolError(f"ready for step {ready.step} after step {self.go.step}")
        self.state = State.READY
        self._ready_step = ready.step
        return self._stamped(ready)

    def _cast(self, vote: Vote, now_s: float) -> list[NodeMessage]:
        if not self._rounds_left or vote.round_id != self._rounds_left[0]:
            expected = f"round {self._rounds_left[0]}" if self._rounds_left else "no round"
            raise ProtocolError(f"vote on round {vote.round_id}, open is {expected}")
        self.state = State.VOTED
        return self._stamped(vote)

    def _stamped(self, message: Ready | Vote | Saved | Suspect, now_s: float = 0.0) -> list[NodeMessage]:
        """The message, with the generation that it belongs to; nothing where there has been none."""
        if self.roster is None:
            return []
        return [msgspec.structs.replace(message, generation=self.roster.generation)]

    def _pass(self, message: Changed | Join, now_s: float) -> list[NodeMessage]:
        return [message]

    def _go_away(self, message: Leave | Failed, now_s: float) -> list[NodeMessage]:
        self._end(End.LEFT, message.reason or "left")
        self.state = State.GONE
        return [message]

    def _say_farewell(self, message: Leave | Failed, now_s: float) -> list[NodeMessage]:
        self.state = State.GONE
        return [message]

    def _say_nothing(self, event: NodeMessage | Tick | PeerLost, now_s: float) -> list[NodeMessage]:
        return []

    def _wait_for_answer(self, tick: Tick, now_s: float) -> list[NodeMessage]:
        if now_s - self._heard_s > self._config.join_timeout_s:
            self._end(End.UNREACHABLE, f"no answer from the coordinator within {self._config.join_timeout_s:g} s")
            self.state = State.GONE  # the coordinator never answered, so it waits for no farewell
        return []

    def _keep_in_touch(self, tick: Tick, now_s: float) -> list[NodeMessage]:
        if now_s - self._ticked_s > self._timeout_s / 2:  # this process was stopped: what came meanwhile is to be read
            self._heard_s = now_s
        self._ticked_s = now_s
        limit_s = self._timeout_s + self._config.return_timeout_s
        if now_s - self._heard_s > limit_s:
            self._end(End.ABORTED, f"the coordinator was lost: silent for {limit_s:g} s")
            return []
        if now_s < self._next_beat_s:
            return []
        self._next_beat_s = now_s + self._interval_s
        return [Heartbeat()]

    def _break_off(self, lost: PeerLost, now_s: float) -> list[NodeMessage]:
        self._end(End.ABORTED, lost.reason)
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
        """A generation begins: what was under way in an older one is void."""
        self._supersede(roster.generation)
        first = self.roster is None
        self._enter(roster)
        if first:
            self.began_s = now_s - roster.elapsed_s

    def _paused(self, pause: Pause, now_s: float) -> None:
        self._supersede(pause.generation)
        self.state = State.WAITING

    def _evicted(self, evicted: Evicted, now_s: float) -> None:
        self._end(End.EVICTED, evicted.reason)

    def _supersede(self, generation: int) -> None:
        """The older generation is over."""
        if generation <= self.generation:
            raise self._wrong(f"generation {generation} after {self.generation}")
        self.generation = generation
        self.go = None
        self._ready_step = -1
        self._rounds_left = []

    def _enter(self, roster: Roster) -> None:
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
        self.state = State.RUNNING

    def _begun(self, go: Go, now_s: float) -> None:
        assert self.roster is not None
        if go.generation != self.roster.generation:
            raise self._wrong(f"Go of generation {go.generation}, the roster is of {self.roster.generation}")
        if go.step != self._ready_step:
            raise self._wrong(f"Go for step {go.step}, this node is ready for {self._ready_step}")
        if any(len(round_.weights) != len(self.roster.members) for round_ in [*go.rounds, *go.begins]):
            raise self._wrong("a round whose weights do not fit the members")
        self.go = go
        self._rounds_left = [round_.round_id for round_ in go.rounds]
        self.state = State.RUNNING

    def _agreed(self, commit: Commit, now_s: float) -> None:
        if commit.again and self._rounds_left[:1] != [commit.round_id]:
            return  # it has been heard, or was for others
        self._require_open(commit.round_id)
        self.committed = self._rounds_left.pop(0)
        self.state = State.RUNNING

    def _agreed_before(self, commit: Commit, now_s: float) -> None:
        if not commit.again:
            raise self._wrong(f"a verdict on round {commit.round_id}, which is not open here")

    def _altered(self, alter: Alter, now_s: float) -> None:
        if alter.number <= len(self.changes):
            return  # a coordinator that was started again says it once more
        if alter.number != len(self.changes) + 1:
            raise self._wrong(f"change {alter.number} of the network after change {len(self.changes)}")
        self.changes = (*self.changes, alter.timed)

    def _stopped(self, stop: Stop, now_s: float) -> None:
        self._end(End.FINISHED if stop.ok else End.ABORTED, stop.reason)

    def _heard(self, message: CoordinatorMessage, now_s: float) -> None:
        pass  # `receive` notes the time; after the end, messages that were under way have no effect

    def _require_open(self, round_id: int) -> None:
        if not self._rounds_left or round_id != self._rounds_left[0]:
            raise self._wrong(f"a verdict on round {round_id}, which is not open here")

    def _is_mine(self, refused: Refused) -> bool:
        assert self._join is not None
        return refused.address in ("", self._join.address)

    def _end(self, how: End, reason: str) -> None:
        self.ending = Ending(how, reason)
        self.state = State.DONE

    def _wrong(self, message: str) -> ProtocolError:
        generation = self.roster.generation if self.roster else None
        return ProtocolError(message, peer=COORDINATOR, generation=generation)


LocalMove = Callable[[Member, Any, float], list[NodeMessage]]
RemoteMove = Callable[[Member, Any, float], None]

LOCAL: Final[Table[State, LocalMove]] = {
    **{(state, Join): row(Member._ask, State.JOINING) for state in (State.NEW, State.DONE)},
    (State.WAITING, Join): row(Member._pass, State.WAITING),
    (State.RUNNING, Ready): row(Member._report, State.READY),
    (State.RUNNING, Vote): row(Member._cast, State.VOTED),
    **{(state, kind): row(Member._stamped, state) for state in _IN_WORLD for kind in (Saved, Suspect)},
    **{(state, Changed): row(Member._pass, state) for state in _IN_WORLD},
    (State.DONE, Saved): row(Member._stamped, State.DONE),
    **{(state, Changed): row(Member._say_nothing, state) for state in (State.WAITING, *_OVER)},
    **{(state, Suspect): row(Member._say_nothing, state) for state in (*_BEFORE, *_OVER)},
    (State.WAITING, Saved): row(Member._say_nothing, State.WAITING),
    **{(state, kind): row(Member._go_away, State.GONE) for state in _JOINED for kind in (Leave, Failed)},
    **{(State.DONE, kind): row(Member._say_farewell, State.GONE) for kind in (Leave, Failed)},
    **{(state, kind): row(Member._say_nothing, state) for state in _APART for kind in (Leave, Failed)},
    (State.JOINING, Tick): row(Member._wait_for_answer, State.JOINING, State.GONE),
    **{(state, Tick): row(Member._keep_in_touch, state, State.DONE) for state in _LIVE},
    **{(state, Tick): row(Member._say_nothing, state) for state in (State.NEW, *_OVER)},
    **{(state, PeerLost): row(Member._break_off, State.DONE) for state in (State.NEW, *_JOINED)},
    **{(state, PeerLost): row(Member._say_nothing, state) for state in _OVER},
}

REMOTE: Final[Table[State, RemoteMove]] = {
    (State.JOINING, Welcome): row(Member._welcomed, State.WAITING),
    (State.JOINING, Refused): row(Member._refused, State.JOINING, State.GONE),
    (State.JOINING, Stop): row(Member._stopped, State.DONE),
    (State.JOINING, Heartbeat): row(Member._heard, State.JOINING),
    (State.JOINING, Evicted): row(Member._heard, State.JOINING),  # an answer to what was said before it asked anew
    **{(state, Roster): row(Member._enrolled, State.RUNNING) for state in (State.WAITING, *_IN_WORLD)},
    **{(state, Pause): row(Member._paused, State.WAITING) for state in _IN_WORLD},
    **{(state, Evicted): row(Member._evicted, State.DONE) for state in _LIVE},
    (State.READY, Go): row(Member._begun, State.RUNNING),
    **{(state, Alter): row(Member._altered, state) for state in (State.WAITING, *_IN_WORLD)},
    (State.VOTED, Commit): row(Member._agreed, State.RUNNING, State.VOTED),
    # What a coordinator that was started again says once more.
    **{(state, Commit): row(Member._agreed_before, state) for state in (State.WAITING, State.RUNNING, State.READY)},
    **{(state, Welcome): row(Member._heard, state) for state in _LIVE},
    **{(state, Stop): row(Member._stopped, State.DONE) for state in _LIVE},
    **{(state, Heartbeat): row(Member._heard, state) for state in _LIVE},
    # A refusal is legal here only where its address shows that it is for another node of this name.
    **{(state, Refused): row(Member._refused_other, state) for state in _LIVE},
    **{
        (state, kind): row(Member._heard, state)
        for state in _OVER
        for kind in (Welcome, Refused, Roster, Go, Alter, Commit, Pause, Evicted, Stop, Heartbeat)
    },
}
