"""Two endpoints without sockets, threads or clock, joined by a wire that misbehaves as told.

Everything of netem but its shell: shaper, link and assembler, driven from event to event. Time jumps.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

from netem.assembly import Assembler
from netem.errors import IsthmusError
from netem.frames import Header, check_payload, decode, intact
from netem.lane import Lane
from netem.limits import Limits
from netem.link import Link, Silence, Terms, Verdict
from netem.profile import Profile
from netem.segments import Message
from netem.shaper import Shaper

LIMITS = Limits(resend_s=0.5, silent_s=20.0)
TICK_S = 0.05
ENDLESS = Terms(window_bytes=10**9, peer_window_bytes=10**9, resend_s=1e9, silent_s=1e9, ack_delay_s=1e9)


class Side:
    """One endpoint with one peer. `received` has what was delivered: (generation, tag, payload, time)."""

    def __init__(
        self,
        name: str,
        peer: str,
        profile: Profile,
        incarnation: int,
        limits: Limits = LIMITS,
        *,
        ack_delay_s: float | None = None,
    ) -> None:
        self.name, self.peer = name, peer
        self.now = 0.0
        self.generation = 0
        self.received: list[tuple[int, bytes, bytes, float]] = []
        self.errors: list[IsthmusError] = []
        self.completed: list[bytes] = []
        self.segments: list[tuple[float, Any]] = []
        self.peak_in_flight = 0
        self.resent = 0
        self.silent_at = math.inf
        self.shaper = Shaper(name, profile)
        terms = Terms(
            window_bytes=profile.credit_bytes(name, peer),
            peer_window_bytes=profile.credit_bytes(peer, name),
            resend_s=limits.resend_s + profile.round_trip_s(name, peer),
            silent_s=limits.silent_s,
            ack_delay_s=profile.ack_delay_s(peer, name) if ack_delay_s is None else ack_delay_s,
        )
        self.link = Link("run", incarnation, terms)
        self.lane = self.shaper.add(peer, self.link)
        self.assembler = Assembler(peer, self, limits)

    def send(self, tag: bytes, payload: bytes = b"", *, urgent: bool = False, flow: int = 0) -> None:
        self.lane.enqueue(
            Message(
                tag,
                [memoryview(payload)],
                generation=self.generation,
                urgent=urgent,
                flow=flow,
                queued_at=self.now,
            )
        )

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.received.append((generation, tag, bytes(buffer), self.now))

    def failed(self, error: IsthmusError) -> None:
        self.errors.append(error)

    @property
    def tags(self) -> list[bytes]:
        return [tag for _, tag, _, _ in self.received]

    def poll(self, now: float) -> list[tuple[bytes, bytes]]:
        """The frames that are to be written now."""
        self.now = now
        frames = []
        for arrival, lane, segment in self.shaper.poll(now):
            assert arrival <= now
            lane.link.written(segment, now)
            self.segments.append((arrival, segment))
            self.resent += segment.resent
            frames.append((segment.header, bytes(segment.payload)))
        self.peak_in_flight = max(self.peak_in_flight, self.link.in_flight_bytes)
        return frames

    def take(self, frame: tuple[bytes, bytes], now: float) -> Verdict:
        """A frame comes in."""
        self.now = now
        header: Header = decode(frame[0], max_tag_bytes=LIMITS.max_tag_bytes)
        payload = memoryview(frame[1])
        check_payload(header, payload.nbytes)
        if self.link.renewed(header):
            self.assembler.reset()
            self.lane.restart()
        verdict = self.link.receive(header, now)
        self.completed += [message.tag for message in self.lane.finish(self.link.released)]
        self.link.released.clear()
        if verdict is Verdict.NEXT:
            assert intact(header, payload)
            self.link.accept(payload.nbytes, now)
            self.assembler.add(header, payload, self.generation)
        return verdict

    def tick(self, now: float) -> None:
        if self.link.check(now) is Silence.DEAD:
            self.silent_at = now


def lane_of(shaper: Shaper, peer: str) -> Lane:
    """A lane whose link never runs out of credit and never resends."""
    return shaper.add(peer, Link("r", 1, ENDLESS))


def message(nbytes: int, tag: bytes = b"", *, flow: int = 0, urgent: bool = False, at: float = 0.0) -> Message:
    return Message(tag, [memoryview(bytes(nbytes))], flow=flow, urgent=urgent, queued_at=at)


Fate = Callable[[], list[float]]
"""The delays with which a frame arrives: none if it is lost, several if it is repeated."""


def bad(chance: random.Random, loss: float, repetition: float, disorder_s: float) -> Fate:
    """A wire that loses and repeats frames with these probabilities, and delays them by up to `disorder_s`."""

    def fate() -> list[float]:
        if chance.random() < loss:
            return []
        return [chance.random() * disorder_s for _ in range(2 if chance.random() < repetition else 1)]

    return fate


class Wire:
    """Joins two sides. `cut` loses everything."""

    def __init__(self, left: Side, right: Side, fate: Fate = lambda: [0.0]) -> None:
        self.sides = [left, right]
        self.fate = fate
        self.cut = False
        self.now = 0.0
        self._on_the_way: list[tuple[float, int, int, tuple[bytes, bytes]]] = []
        self._order = itertools.count()
        self._tick_at = TICK_S

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass from event to event until `done`, or `until`; whether it was done."""
        while True:
            self._step()
            if done():
                return True
            times = [side.shaper.next_time() for side in self.sides] + [self._tick_at]
            times += [self._on_the_way[0][0]] if self._on_the_way else []
            if min(times) > until:
                self.now = until
                return done()
            self.now = max(self.now, min(times))

    def _step(self) -> None:
        while self._on_the_way and self._on_the_way[0][0] <= self.now:
            _, _, target, frame = heapq.heappop(self._on_the_way)
            self.sides[target].take(frame, self.now)
        for index, side in enumerate(self.sides):
            for frame in side.poll(self.now):
                for delay_s in [] if self.cut else self.fate():
                    heapq.heappush(self._on_the_way, (self.now + delay_s, next(self._order), 1 - index, frame))
        if self.now >= self._tick_at:
            self._tick_at = self.now + TICK_S
            for side in self.sides:
                side.tick(self.now)
