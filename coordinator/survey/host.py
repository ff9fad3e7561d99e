"""The host of a survey: who has come, whose turn it is, and what was found. A machine without I/O or clock.

It waits for the guests, tells them about each other, and gives out the turns (`coordinator.survey.turns`); a turn ends
when all have reported, or after its time and a grace. A guest that is silent then, or leaves, is left out of the rest.
Strangers have proved that they have the run's token before they come this far (`coordinator.doorkeeper`).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from coordinator.messages import COORDINATOR, PROTOCOL_VERSION, Refused
from coordinator.survey.messages import (
    MOST_GUESTS,
    Arrive,
    Circle,
    FromGuest,
    FromHost,
    Link,
    Part,
    Report,
    Seat,
    Turn,
    Verdict,
    Waiting,
)
from coordinator.survey.turns import Plan, plan_turns
from netem.names import plain

GRACE_S = 15.0
"""How much longer than its time a turn may take. A guest that is cut off needs this to be sure of it."""
SAY_EVERY_S = 5.0


class Guest(NamedTuple):
    """One machine that came. `seen_from` is the IP address that it called from."""

    peer: str
    arrive: Arrive
    seen_from: str

    @property
    def name(self) -> str:
        """Its name for people."""
        return self.arrive.name


class Way(NamedTuple):
    """All that is known of the way from one guest to another. `link` is what the sender found at rest."""

    link: Link
    heard: int = 0
    """Probes that arrived."""
    rate_bps: float = 0.0
    """With nothing else on the sender's and the receiver's line; 0 where it was not measured."""
    shared_bps: float = 0.0
    """While all links of all guests were full."""


class Survey(NamedTuple):
    """The result. Guests are in the order of their names."""

    guests: tuple[Guest, ...]
    ways: dict[tuple[str, str], Way]
    """By the names of sender and receiver."""
    absent: int
    """How many were awaited in vain."""
    lost: tuple[str, ...]
    """Guests that left or fell silent, with the reason."""


class Send(NamedTuple):
    """Send a message to a guest, or to one who is refused."""

    peer: str
    message: FromHost


class Trust(NamedTuple):
    """This caller is a guest from now on."""

    peer: str


class Judge(NamedTuple):
    """The survey is complete: say what it means, and call `Host.conclude`."""

    survey: Survey


Action = Send | Trust | Judge


class Phase(enum.Enum):
    """Where the survey is."""

    GATHERING = "waiting for machines"
    TURNS = "measuring"
    OVER = "over"


class Host:
    """Surveys `expected` guests. It waits `wait_s` for them, and then begins with those that are here, if two are.

    `secret` proves to guests that do not encrypt that the other is one too.
    """

    def __init__(self, expected: int, wait_s: float, secret: str, now_s: float) -> None:
        self.phase = Phase.GATHERING
        self._expected = expected
        self._gather_until_s = now_s + wait_s
        self._secret = secret
        self._guests: dict[str, Guest] = {}
        self._here: list[str] = []
        self._lost: list[str] = []
        self._plans: list[Plan] = []
        self._turn = -1
        self._turn_until_s = 0.0
        self._awaited: set[str] = set()
        self._said_s = now_s
        self._ways: dict[tuple[str, str], Way] = {}

    def receive(self, peer: str, message: FromGuest, seen_from: str, now_s: float) -> list[Action]:
        """A message has come, from a guest or from one who wants to be."""
        if isinstance(message, Arrive):
            return self._arrived(peer, message, seen_from, now_s)
        if peer not in self._here:
            return []
        if isinstance(message, Part):
            return self.lost(peer, message.reason or "it was ended", now_s)
        if message.turn == self._turn and peer in self._awaited:
            self._note(peer, message)
            self._awaited.discard(peer)
            return self._go_on(now_s)
        return []

    def lost(self, peer: str, reason: str, now_s: float) -> list[Action]:
        """A guest is gone."""
        if peer not in self._here or self.phase is Phase.OVER:
            return []
        self._here.remove(peer)
        self._awaited.discard(peer)
        if self.phase is Phase.GATHERING:
            del self._guests[peer]
            return []
        self._lost.append(f"{plain(peer)} left: {reason}")
        return self._go_on(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Let time pass."""
        if self.phase is Phase.TURNS:
            if now_s < self._turn_until_s:
                return []
            for peer in sorted(self._awaited):
                self._here.remove(peer)
                self._lost.append(f"{plain(peer)} fell silent while it measured")
            self._awaited.clear()
            return self._go_on(now_s)
        if self.phase is Phase.GATHERING:
            if now_s >= self._gather_until_s:
                return self._begin(now_s)
            if now_s - self._said_s >= SAY_EVERY_S:
                self._said_s = now_s
                return [Send(peer, Waiting(text=self.text)) for peer in self._here]
        return []

    def conclude(self, verdict: Verdict) -> list[Action]:
        """The result is known: tell everyone."""
        return [Send(peer, verdict) for peer in self._here]

    @property
    def text(self) -> str:
        """Who is here, for people."""
        names = ", ".join(sorted(guest.name for guest in self._guests.values())) or "nobody"
        return f"{len(self._here)} of {self._expected} machines are here: {names}"

    def _arrived(self, peer: str, arrive: Arrive, seen_from: str, now_s: float) -> list[Action]:
        if peer in self._guests:
            return []
        if (reason := self._refusal(peer, arrive)) is not None:
            return [Send(peer, Refused(reason=reason, address=arrive.address))]
        self._guests[peer] = Guest(peer, arrive, seen_from)
        self._here.append(peer)
        self._said_s = now_s
        told: list[Action] = [Trust(peer), *(Send(other, Waiting(text=self.text)) for other in self._here)]
        return told if len(self._here) < self._expected else [*told, *self._begin(now_s)]

    def _refusal(self, peer: str, arrive: Arrive) -> str | None:
        if arrive.version != PROTOCOL_VERSION:
            return (
                f"{arrive.name} speaks protocol version {arrive.version}, this survey version {PROTOCOL_VERSION}; "
                "install the same isthmus on all machines"
            )
        if plain(peer) != arrive.name or arrive.name == COORDINATOR:
            return f"{arrive.name!r} is not a name that the endpoint {peer!r} may use"
        if self.phase is not Phase.GATHERING or len(self._here) >= min(self._expected, MOST_GUESTS):
            return f"the survey has begun with {len(self._guests)} machines; start it again for all, with more --nodes"
        if any(guest.name == arrive.name for guest in self._guests.values()):
            return f"another machine is called {arrive.name}; give this one another name with --name"
        return None

    def _begin(self, now_s: float) -> list[Action]:
        if len(self._here) < 2:
            return self._finish()
        self.phase = Phase.TURNS
        seats = [
            Seat(
                name=guest.name,
                peer=guest.peer,
                address=guest.arrive.address,
                key=guest.arrive.key,
                encrypted=guest.arrive.encrypted,
            )
            for guest in self._guests.values()
        ]
        self._plans = plan_turns(sorted(self._here))
        circle = Circle(secret=self._secret, seats=seats)
        return [*(Send(peer, circle) for peer in self._here), *self._next(now_s)]

    def _go_on(self, now_s: float) -> list[Action]:
        if self._awaited:
            return []
        self._plans.pop(0)
        return self._next(now_s)

    def _next(self, now_s: float) -> list[Action]:
        """The next turn in which somebody can measure, or the end."""
        while self._plans:
            plan = self._plans[0]
            self._turn += 1
            targets = {peer: self._reachable(plan, peer) for peer in self._here}
            if any(targets.values()):
                self._awaited = set(self._here)
                self._turn_until_s = now_s + plan.duration_s + GRACE_S
                return [
                    Send(
                        peer,
                        Turn(turn=self._turn, fill=plan.fill, targets=targets[peer], duration_s=plan.duration_s),
                    )
                    for peer in self._here
                ]
            self._plans.pop(0)
        return self._finish()

    def _reachable(self, plan: Plan, peer: str) -> list[str]:
        here = [other for other in plan.targets.get(peer, ()) if other in self._here]
        if not self._ways:  # in the first turn
            return here
        return [other for other in here if (way := self._ways.get((peer, other))) is not None and way.link.echoed]

    def _note(self, peer: str, report: Report) -> None:
        plan = self._plans[0]
        for link in report.links:
            if link.peer not in self._guests or link.peer == peer:
                continue
            there, back = (peer, link.peer), (link.peer, peer)
            way = self._ways.get(there)
            if not plan.fill:
                heard = way.heard if way else 0
                self._ways[there] = Way(link, heard)
                blank = Way(Link(peer=peer))
                self._ways[back] = self._ways.get(back, blank)._replace(heard=link.heard)
            elif way is not None:
                rate_bps = link.rate_bps
                alone = plan.alone
                self._ways[there] = way._replace(rate_bps=rate_bps) if alone else way._replace(shared_bps=rate_bps)

    def _finish(self) -> list[Action]:
        self.phase = Phase.OVER
        guests = tuple(sorted(self._guests.values(), key=lambda guest: guest.name))
        names = {guest.peer: guest.name for guest in guests}
        ways = {(names[source], names[target]): way for (source, target), way in self._ways.items()}
        return [Judge(Survey(guests, ways, self._expected - len(guests), tuple(self._lost)))]
