"""A guest of a survey: dial the others, send probes when it is told to, report. A machine without I/O or clock.

It answers the probes of the others at any time. Every wait has a limit: the host must be heard within `HOST_SILENT_S`,
and a turn ends `PATIENCE_S` after its time at the latest, with what was found until then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from coordinator.messages import Refused, shorten
from coordinator.survey.messages import (
    Arrive,
    Circle,
    Echoed,
    FromGuest,
    FromHost,
    Link,
    Part,
    Probe,
    Report,
    Seat,
    Turn,
    Verdict,
    Waiting,
)
from netem.probe import Calm, Echo, Fill, Trickle

ARRIVE_EVERY_S = 2.0
HOST_SILENT_S = 60.0
PATIENCE_S = 8.0
"""How long after the end of a turn answers may come."""
_IDLE_S = 0.25
MOST_LATENCY_S = 3600.0


class Say(NamedTuple):
    """Send a message to the host."""

    message: FromGuest


class Dial(NamedTuple):
    """Open a connection to each of these guests, and try besides why none can be opened where that is so. `secret`
    proves to those that do not encrypt that this is a guest too."""

    seats: tuple[Seat, ...]
    secret: str


class Shoot(NamedTuple):
    """Send a probe with a payload of this size to a guest."""

    peer: str
    probe: Probe
    nbytes: int


class Answer(NamedTuple):
    """Answer a probe of a guest."""

    peer: str
    echo: Echoed


class CountSegments(NamedTuple):
    """Call `counted` with what the kernel has counted for these guests."""

    peers: tuple[str, ...]


class Tell(NamedTuple):
    """Something for the person in front of the screen."""

    text: str


Action = Say | Dial | Shoot | Answer | CountSegments | Tell


class Guest:
    """One machine in a survey. `verdict` is set when it has ended well, `failure` when it has not."""

    def __init__(self, me: str, arrive: Arrive, join_s: float, now_s: float) -> None:
        self.verdict: Verdict | None = None
        self.failure = ""
        self._me = me
        self._arrive = arrive
        self._silent_s = join_s
        self._heard_s = now_s
        self._arrive_at_s = now_s
        self._in = False
        self._peers: tuple[str, ...] = ()
        self._trouble: dict[str, str] = {}
        self._heard: Counter[str] = Counter()
        self._round_trips_s: dict[str, float] = {}
        self._before: Mapping[str, tuple[int, int]] = {}
        self._turn: Turn | None = None
        self._turn_ends_s = math.inf
        self._probes: dict[str, Trickle | Fill] = {}
        self._numbers: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        """Whether the survey has ended here."""
        return self.verdict is not None or bool(self.failure)

    def next_s(self, now_s: float) -> float:
        """When `tick` is to be called next, if nothing happens before."""
        due_s = [probe.next_s() for probe in self._probes.values() if isinstance(probe, Trickle)]
        return min([now_s + _IDLE_S, self._turn_ends_s, *due_s])

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass."""
        if self.over:
            return []
        if now_s - self._heard_s > self._silent_s:
            self.failure = "the host fell silent" if self._in else "nobody answers"
            return []
        actions: list[Action] = []
        if not self._in and now_s >= self._arrive_at_s:
            self._arrive_at_s = now_s + ARRIVE_EVERY_S
            actions.append(Say(self._arrive))
        return [*actions, *self._measure(now_s)]

    def told(self, message: FromHost, now_s: float) -> list[Action]:
        """The host says something."""
        self._heard_s = now_s
        if not self._in:
            self._in, self._silent_s = True, HOST_SILENT_S
        match message:
            case Refused(reason=reason):
                self.failure = f"the host refuses this machine: {reason}"
            case Verdict():
                self.verdict = message
            case Waiting(text=text):
                return [Tell(text)]
            case Circle():
                others = tuple(seat for seat in message.seats if seat.peer != self._me)
                self._peers = tuple(seat.peer for seat in others)
                names = ", ".join(seat.name for seat in others)
                return [Dial(others, message.secret), Tell(f"all are here; measuring the ways to {names}")]
            case Turn():
                return self._begin(message, now_s)
        return []

    def refused(self, reason: str) -> None:
        """The host does not let this machine in."""
        self.failure = reason

    def dialled(self, peer: str, trouble: str) -> None:
        """It has been tried to open a connection to a guest; `trouble` is empty if that went well."""
        self._trouble[peer] = trouble

    def probed(self, peer: str, probe: Probe, came_s: float, now_s: float) -> list[Action]:
        """A probe has come from a guest."""
        if peer not in self._peers:
            return []
        self._heard[peer] += 1
        echo = Echoed(turn=probe.turn, number=probe.number, sent_s=probe.sent_s, came_s=came_s, echoed_s=now_s)
        return [Answer(peer, echo)]

    def echoed(self, peer: str, echo: Echoed, back_s: float, now_s: float) -> list[Action]:
        """The answer to a probe has come. One of another turn counts for nothing."""
        probe = self._probes.get(peer)
        if probe is None or self._turn is None or echo.turn != self._turn.turn:
            return []
        probe.echoed(Echo(echo.number, echo.sent_s, echo.came_s, echo.echoed_s, back_s))
        return self._measure(now_s)

    def counted(self, segments: Mapping[str, tuple[int, int]], now_s: float) -> list[Action]:
        """Segments with data that TCP has sent to each guest so far, and those sent again among them."""
        turn = self._turn
        if turn is None or turn.fill:
            return []
        if not self._finished(now_s):
            self._before = segments
            return []
        return self._report(now_s, segments)

    def leave(self, reason: str) -> list[Action]:
        """This machine does not go on."""
        self.failure = self.failure or reason
        return [Say(Part(reason=shorten(reason)[:512]))]

    def _begin(self, turn: Turn, now_s: float) -> list[Action]:
        self._turn = turn
        self._turn_ends_s = now_s + turn.duration_s + PATIENCE_S
        targets = [peer for peer in turn.targets if peer in self._peers]
        self._numbers.clear()
        if turn.fill:
            trips_s = self._round_trips_s
            self._probes = {peer: Fill(now_s, turn.duration_s, trips_s.get(peer, 0.1)) for peer in targets}
            return self._measure(now_s)
        self._probes = {peer: Trickle(now_s, turn.duration_s) for peer in targets}
        return [CountSegments(tuple(targets)), *self._measure(now_s)]

    def _measure(self, now_s: float) -> list[Action]:
        """Send what is due; report where this turn is done."""
        if self._turn is None:
            return []
        actions: list[Action] = []
        for peer, probe in self._probes.items():
            for nbytes in probe.due(now_s):
                actions.append(
                    Shoot(peer, Probe(turn=self._turn.turn, number=self._numbers[peer], sent_s=now_s), nbytes)
                )
                self._numbers[peer] += 1
        if not self._finished(now_s):
            return actions
        if self._turn.fill:
            return [*actions, *self._report(now_s, {})]
        self._turn_ends_s = now_s  # the answer to the count comes at once
        return [*actions, CountSegments(tuple(self._probes))]

    def _finished(self, now_s: float) -> bool:
        if now_s >= self._turn_ends_s:
            return True
        return all(
            probe.is_over(now_s) if isinstance(probe, Fill) else probe.all_sent and probe.all_back
            for probe in self._probes.values()
        )

    def _report(self, now_s: float, after: Mapping[str, tuple[int, int]]) -> list[Action]:
        turn, self._turn, self._turn_ends_s = self._turn, None, math.inf
        assert turn is not None
        links = [self._link(peer, probe, after) for peer, probe in self._probes.items()]
        self._probes = {}
        return [Say(Report(turn=turn.turn, links=links))]

    def _link(self, peer: str, probe: Trickle | Fill, after: Mapping[str, tuple[int, int]]) -> Link:
        if isinstance(probe, Fill):
            return Link(peer=peer, rate_bps=probe.rate_bps())
        calm = probe.figures()
        before, now = self._before.get(peer, (0, 0)), after.get(peer, (0, 0))
        answered = calm.echoed > 0
        if answered:
            self._round_trips_s[peer] = 2 * calm.latency_s
        return Link(
            peer=peer,
            trouble="" if answered else self._why_silent(peer, calm),
            sent=calm.sent,
            echoed=calm.echoed,
            heard=self._heard[peer],
            latency_s=min(calm.latency_s, MOST_LATENCY_S) if answered else 0.0,
            jitter_s=min(calm.jitter_s, MOST_LATENCY_S),
            ahead_s=calm.ahead_s,
            segments=max(0, now[0] - before[0]),
            repeated=max(0, now[1] - before[1]),
        )

    def _why_silent(self, peer: str, calm: Calm) -> str:
        return self._trouble.get(peer) or f"none of {calm.sent} probes was answered"
