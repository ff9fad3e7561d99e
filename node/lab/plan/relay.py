"""When relayed payloads are where they are read: piece by piece, by the ways of `node.exchange.routes`.

A node sends the pieces of its own chunks, and each piece that it passes on as soon as it has it. At a NIC all links
take equal turns, and on a link the pieces of own chunks and those that are passed on do (`node.exchange.wire`); in one
such queue they keep their order. A receiving NIC serves pieces in order of arrival. Rates are fluid, as everywhere in
the planner (`node.lab.plan.lines`), but here times depend on each other, so pieces are events in a queue.

Shapes: R ranks, C chunks; [R, R] is [sender, receiver].
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

from coordinator.assignment import Assignment
from node.exchange.routes import Routes, span_of
from node.lab.plan.sharing import SharedLine
from node.lab.plan.work import Array

OWN, PASSED_ON = 0, 1

_Place = tuple[int, int | None]
"""A sender, and the receiver where each of its links has a rate of its own."""


class Message(NamedTuple):
    """A piece on its way over one link."""

    sender: int
    receiver: int
    chunk: int
    piece: int
    nbytes: float


class Rates(NamedTuple):
    """Rates and latencies (`node.lab.plan.lines.Lines`)."""

    links_RR: Array
    latency_RR: Array
    up_R: Array
    down_R: Array


class Free(NamedTuple):
    """Until when lines are busy with earlier messages."""

    links_RR: Array
    up_R: Array
    down_R: Array


class _Server(SharedLine[Message]):
    """A NIC or a link, which also knows from when on the next layer's messages are served."""

    def __init__(self, rate_bps: float, free_s: float) -> None:
        super().__init__(rate_bps, free_s)
        self._rate_bps = rate_bps
        self._begin_s, self._work_s, self._own_end_s = np.inf, 0.0, -np.inf

    def put(self, kind: int, message: Message, now: float) -> None:
        """The message is ready at `now`; its own queue is that of its receiver and kind."""
        self.add((message.receiver, kind), message, message.nbytes, now)
        self._begin_s = min(self._begin_s, self.now_s)
        self._work_s += 8 * message.nbytes / self._rate_bps

    def take(self) -> tuple[Message, float]:
        """The message that leaves at `next_s`, and when it began to leave."""
        message, queue, begin_s = self.pop()
        if queue[1] == OWN:  # type: ignore[index]
            self._own_end_s = self.now_s
        return message, begin_s

    def free_s(self, before_s: float) -> float:
        """From when on the next layer's messages are served: gaps before pieces that come late are theirs."""
        return max(before_s, self._own_end_s, self._begin_s + self._work_s if self._work_s else -np.inf)


class Relayed:
    """One layer's payloads of `nbytes` bytes, which all owners send at their times `at_R`.

    `run` gives when each reader has each chunk, [C, R], and when the lines are free again.
    """

    def __init__(
        self, assignment: Assignment, routes: Routes, rates: Rates, at_R: Array, nbytes: int, free: Free
    ) -> None:
        self._assignment, self._routes, self._rates, self._free, self._nbytes = assignment, routes, rates, free, nbytes
        self._arrived_CR = np.full((assignment.n_chunks, assignment.n_ranks), -np.inf)
        self._down_R = free.down_R.copy()
        self._servers: dict[_Place, _Server] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        for rank, at_s in enumerate(at_R.tolist()):
            self._at(at_s, partial(self._publish, rank))

    def run(self) -> tuple[Array, Free]:
        while self._events:
            now, _, happens = heapq.heappop(self._events)
            happens(now)
        links_RR, up_R = self._free.links_RR.copy(), self._free.up_R.copy()
        for (rank, other), server in self._servers.items():
            free, place = (up_R, rank) if other is None else (links_RR, (rank, other))
            free[place] = server.free_s(free[place])
        return self._arrived_CR, Free(links_RR, up_R, self._down_R)

    def _at(self, when_s: float, happens: Callable[[float], None]) -> None:
        if np.isfinite(when_s):
            heapq.heappush(self._events, (when_s, next(self._order), happens))

    def _publish(self, rank: int, now: float) -> None:
        for chunk in self._assignment.chunks(rank):
            for piece, target in self._routes.sends(rank, chunk):
                begin, end = span_of(piece, self._routes.pieces(chunk), self._nbytes)
                self._send(OWN, Message(rank, target, chunk, piece, float(end - begin)), now)

    def _send(self, kind: int, message: Message, now: float) -> None:
        """Queue it at the sender's NIC, which its links share; where that has no limit, at its link."""
        rank = message.sender
        place = rank, None if np.isfinite(self._rates.up_R[rank]) else message.receiver
        if place not in self._servers:
            self._servers[place] = self._server(*place)
        self._servers[place].put(kind, message, now)
        self._at(self._servers[place].next_s(), partial(self._leave, place))

    def _server(self, rank: int, other: int | None) -> _Server:
        if other is None:
            return _Server(self._rates.up_R[rank], self._free.up_R[rank])
        return _Server(self._rates.links_RR[rank, other], self._free.links_RR[rank, other])

    def _leave(self, place: _Place, now: float) -> None:
        server = self._servers[place]
        if server.next_s() > now:
            return  # it shares the line with one that came later, and leaves later
        message, begin_s = server.take()
        self._at(server.next_s(), partial(self._leave, place))
        link = message.sender, message.receiver
        alone_s, latency_s = 8 * message.nbytes / self._rates.links_RR[link], self._rates.latency_RR[link]
        self._at(max(now, begin_s + alone_s) + latency_s, partial(self._come, message, begin_s + latency_s))

    def _come(self, message: Message, begin_s: float, now: float) -> None:
        """It has come to the receiver's NIC, at which it began to come at `begin_s`."""
        rank = message.receiver
        self._down_R[rank] = max(self._down_R[rank], begin_s) + 8 * message.nbytes / self._rates.down_R[rank]
        self._at(max(now, float(self._down_R[rank])), partial(self._take, message))

    def _take(self, message: Message, now: float) -> None:
        rank, chunk = message.receiver, message.chunk
        self._arrived_CR[chunk, rank] = max(self._arrived_CR[chunk, rank], now)
        for target in self._routes.targets(rank, chunk, message.piece):
            self._send(PASSED_ON, message._replace(sender=rank, receiver=target), now)
