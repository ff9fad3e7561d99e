"""A survey of machines in one process, on a clock that the test turns: host and guests, and links between them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator.messages import PROTOCOL_VERSION, encode
from coordinator.survey.guest import Answer, CountSegments, Dial, Guest, Say, Shoot, Tell
from coordinator.survey.host import Host, Judge, Send, Survey, Trust
from coordinator.survey.messages import Arrive, Facts, Verdict, from_guest, from_host
from netem.names import plain

START_S = 1000.0
CONTROL_S = 0.01


@dataclass
class Way:
    """One direction of a link."""

    rate_bps: float = 100e6
    latency_s: float = 0.01
    open: bool = True
    segments: tuple[int, int] = (0, 0)
    """What the kernel counts after a trickle."""
    free_s: float = 0.0

    def arrival_s(self, nbytes: int, now_s: float) -> float:
        self.free_s = max(self.free_s, now_s) + 8 * nbytes / self.rate_bps
        return self.free_s + self.latency_s


@dataclass
class Simulated:
    """`names` are the guests. Each has a clock that is ahead by `ahead_s`."""

    names: tuple[str, ...]
    expected: int = 0
    wait_s: float = 60.0
    ways: dict[tuple[str, str], Way] = field(default_factory=dict)
    ahead_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    seen_from: dict[str, str] = field(default_factory=dict)
    silent_from_s: dict[str, float] = field(default_factory=dict)
    """Guests that say nothing any more from this time on."""
    trouble: str = "nothing listens there"
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now_s = START_S
        self.survey: Survey | None = None
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.counter = itertools.count()
        self.host = Host(self.expected or len(self.names), self.wait_s, "secret", self.now_s)
        self.guests = {name: Guest(name, self.arrive(name), 20.0, self.clock_s(name)) for name in self.names}

    def way(self, source: str, target: str) -> Way:
        return self.ways.setdefault((source, target), Way())

    def arrive(self, name: str) -> Arrive:
        facts = self.facts.get(name, Facts(own_address="10.0.0.1"))
        return Arrive(version=PROTOCOL_VERSION, name=name, address=f"tcp://10.0.0.1:{7000 + len(name)}", facts=facts)

    def clock_s(self, name: str) -> float:
        return self.now_s + self.ahead_s.get(name, 0.0)

    def at(self, at_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (at_s, next(self.counter), do))

    def run(self, limit_s: float = 600.0) -> Survey:
        """Until every guest has ended, or the time has passed."""
        for name in self.names:
            self._tick(name)
        self._tick_host()
        while self.queue and self.now_s < START_S + limit_s:
            self.now_s, _, do = heapq.heappop(self.queue)
            do()
            if self.survey is not None and all(guest.over or self.silent(name) for name, guest in self.guests.items()):
                break
        assert self.survey is not None
        return self.survey

    def silent(self, name: str) -> bool:
        return self.now_s >= self.silent_from_s.get(name, 1e18)

    def _tick_host(self) -> None:
        self._act_host(self.host.tick(self.now_s))
        self.at(self.now_s + 0.25, self._tick_host)

    def _tick(self, name: str) -> None:
        guest = self.guests[name]
        if guest.over or self.silent(name):
            return
        self._act(name, guest.tick(self.clock_s(name)))
        self.at(
            max(self.now_s + 1e-6, self.now_s + guest.next_s(self.clock_s(name)) - self.clock_s(name)),
            lambda: self._tick(name),
        )

    def _act_host(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Judge):
                self.survey = action.survey
                self._act_host(self.host.conclude(Verdict(text="done")))
            elif isinstance(action, Send):
                name, message = plain(action.peer), from_host(encode(action.message), "coordinator")
                self.at(self.now_s + CONTROL_S, lambda name=name, message=message: self._tell(name, message))
            else:
                assert isinstance(action, Trust)

    def _receive(self, name: str, message: Any) -> None:
        seen_from = self.seen_from.get(name, "10.0.0.1")
        self._act_host(self.host.receive(name, message, seen_from, self.now_s))

    def _tell(self, name: str, message: Any) -> None:
        if name in self.guests and not self.silent(name):
            self._act(name, self.guests[name].told(message, self.clock_s(name)))

    def _act(self, name: str, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Say):
                message = from_guest(encode(action.message), name)
                self.at(
                    self.now_s + CONTROL_S,
                    lambda message=message: self._receive(name, message),
                )
            elif isinstance(action, Dial):
                for seat in action.seats:
                    if not self.way(name, seat.peer).open:
                        self.guests[name].dialled(seat.peer, self.trouble)
            elif isinstance(action, CountSegments):
                counts = {peer: self.way(name, peer).segments for peer in action.peers}
                turn = self.guests[name]._turn
                first = turn is not None and self.clock_s(name) < self.guests[name]._turn_ends_s - turn.duration_s
                self._act(name, self.guests[name].counted({} if first else counts, self.clock_s(name)))
            elif isinstance(action, Shoot | Answer):
                self._carry(name, action)
            else:
                assert isinstance(action, Tell)
                self.told.append(action.text)

    def _carry(self, name: str, action: Shoot | Answer) -> None:
        peer, way = action.peer, self.way(name, action.peer)
        if not way.open or self.silent(name):
            return
        nbytes = action.nbytes if isinstance(action, Shoot) else 0
        at_s = way.arrival_s(nbytes, self.now_s) if nbytes else self.now_s + way.latency_s

        def come() -> None:
            guest, clock_s = self.guests[peer], self.clock_s(peer)
            if self.silent(peer) or guest.over:
                return
            if isinstance(action, Shoot):
                self._act(peer, guest.probed(name, action.probe, clock_s, clock_s))
            else:
                self._act(peer, guest.echoed(name, action.echo, clock_s, clock_s))

        self.at(at_s, come)
