"""The planner's network: links and NICs between ranks as arrays, and how they delay messages.

A link carries its messages one after the other. A NIC's sending side serves all its links in equal turns, as `netem`'s
deficit round robin does; its receiving side serves messages in order of arrival. Rates are fluid: there are no segments
and no headers (each under 1 % for messages of several segments), no jitter, no loss, and no window, so a slow receiver
never holds a sender back: messages queue before the receiver's NIC.

From one layer to the next, a queue is kept as the time until which a line is busy. That is exact where no message
overtakes one of an earlier layer, which is always so on a link. At a NIC it is within 3 % in all cases of
tests/unit/node/lab/test_plan_simulate.py, which compares it with a simulation segment by segment.

Shapes: R ranks, C chunks; [R, R] is [sender, receiver]; K places of flows that one NIC receives.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.assignment import Assignment
from netem.errors import ConfigError
from netem.profile import Profile
from node.exchange.routes import routes_for
from node.lab.plan.relay import Free, Rates, Relayed
from node.lab.plan.work import Array, reading

Indices = npt.NDArray[np.intp]

LEAST_S = 1e-12
"""Duration of a message that arrives at one instant."""


class Lines(NamedTuple):
    """Rates and latencies by rank; a rate is infinite where it is unlimited."""

    link_bps: Array
    latency_s: Array
    up_bps: Array
    down_bps: Array

    def scaled(self, factor: float) -> Lines:
        """All rates times `factor`; latencies stay."""
        return Lines(self.link_bps * factor, self.latency_s, self.up_bps * factor, self.down_bps * factor)

    def among(self, ranks: Indices) -> Lines:
        """Those of these nodes, with each other."""
        pairs = np.ix_(ranks, ranks)
        return Lines(self.link_bps[pairs], self.latency_s[pairs], self.up_bps[ranks], self.down_bps[ranks])

    def without_latency(self) -> Lines:
        return self._replace(latency_s=np.zeros_like(self.latency_s))

    def slowest_bps(self) -> float:
        """The least rate of any link or NIC; infinite where all are unlimited."""
        return float(min(rates.min() for rates in (self.link_bps, self.up_bps, self.down_bps)))


def lines_of(profile: Profile, ranks: int, names: Sequence[str] = ()) -> Lines:
    """The lines between nodes of these names, by rank; by default they are as `isthmus run` names them. Raises
    `ConfigError` where a link is cut."""
    names = names or [f"node-{rank}" for rank in range(ranks)]

    def bps(rate: float | None) -> float:
        return np.inf if rate is None else rate

    shapes = [[profile.link(source, target) for target in names] for source in names]
    link_bps = np.array([[bps(shape.rate_bps) for shape in row] for row in shapes])
    np.fill_diagonal(link_bps, np.inf)
    up_bps = np.array([bps(profile.nic_up_bps(name)) for name in names])
    down_bps = np.array([bps(profile.nic_down_bps(name)) for name in names])
    if min(link_bps.min(), up_bps.min(), down_bps.min()) <= 0:
        raise ConfigError(f"net.profile: {profile.name} has a link that is cut, over which no step ends")
    return Lines(link_bps, np.array([[shape.latency_s for shape in row] for row in shapes]), up_bps, down_bps)


def without_limits(ranks: int) -> Lines:
    """Unlimited lines between so many nodes."""
    free = np.full(ranks, np.inf)
    return Lines(np.full((ranks, ranks), np.inf), np.zeros((ranks, ranks)), free, free)


class Flows(NamedTuple):
    """The messages of one layer in one direction, grouped by the receiving NIC: [K, R]. `used` is false for padding."""

    chunk: Indices
    peer: Indices
    used: npt.NDArray[np.bool_]


class Traffic:
    """The messages of one step. Times are in seconds; an infinite time means that there is no such message.

    `rows_CR` is the share of a chunk's rows that crosses to each rank, where not all do. With `relays`, readers pass
    payloads on, of which all rows cross (`node.lab.plan.relay`).
    """

    def __init__(
        self, lines: Lines, assignment: Assignment, rows_CR: Array | None = None, relays: bool = False
    ) -> None:
        self.lines = lines
        self._assignment, self._relays = assignment, relays
        ranks, chunks = assignment.n_ranks, assignment.n_chunks
        self.remote = reading(assignment).remote
        self._rows_CR = np.where(self.remote, 1.0 if rows_CR is None else rows_CR, 0.0)
        self._owner = np.array([assignment.owner(chunk) for chunk in range(chunks)])
        self._own = [np.array(assignment.chunks(rank)) for rank in range(ranks)]
        self._links_free = np.zeros((ranks, ranks))
        self._up_free = np.zeros(ranks)
        self._down_free = np.zeros(ranks)
        self._readers = self.remote.sum(1)
        self._to_readers = _grouped(
            [
                [(chunk, assignment.owner(chunk)) for chunk in np.flatnonzero(column).tolist()]
                for column in self.remote.T
            ]
        )
        self._to_owners = _grouped(
            [
                [(chunk, reader) for chunk in assignment.chunks(rank) for reader in assignment.readers_of(chunk)]
                for rank in range(ranks)
            ]
        )
        self.sent_bytes = np.zeros((ranks, ranks))

    def publish(self, at_R: Array, nbytes: float) -> Array:
        """Send every chunk to its readers at its owner's time. Returns when each reader has it, [C, R].

        An owner's chunks leave in order, each to all its readers at once: their links take equal turns at its NIC, so
        that while a message of s bytes is sent, up to s bytes of every other are sent too.
        """
        if self._relays:
            return self._relay(at_R, round(nbytes))
        size_CR = nbytes * self._rows_CR
        begins, ends = np.full(self.remote.shape, -np.inf), np.full(self.remote.shape, -np.inf)
        up_s_C1 = 8 / self.lines.up_bps[self._owner, None]
        turns_s_CR = up_s_C1 * np.minimum(size_CR[:, :, None], size_CR[:, None, :]).sum(2)
        all_s_C = up_s_C1[:, 0] * size_CR.sum(1)
        for place in range(max(map(len, self._own))):
            ranks = np.array([rank for rank, own in enumerate(self._own) if len(own) > place])
            chunk = np.array([self._own[rank][place] for rank in ranks])
            free = self._links_free[ranks]
            begin = np.maximum(np.maximum(at_R[ranks, None], free), self._up_free[ranks, None])
            alone = np.maximum(at_R[ranks, None], free) + 8 * size_CR[chunk] / self.lines.link_bps[ranks]
            from_here = np.maximum(at_R[ranks], self._up_free[ranks])
            end = np.maximum(alone, from_here[:, None] + turns_s_CR[chunk])
            mask = self.remote[chunk]
            begins[chunk], ends[chunk] = begin, end
            self._links_free[ranks] = np.where(mask, end, free)
            self._up_free[ranks] = np.where(self._readers[chunk] > 0, from_here + all_s_C[chunk], self._up_free[ranks])
            self.sent_bytes[ranks] += size_CR[chunk]
        latency_s = self.lines.latency_s[self._owner]
        return self._received(begins + latency_s, ends + latency_s, size_CR, self._to_readers)

    def _relay(self, at_R: Array, nbytes: int) -> Array:
        routes = routes_for(self._assignment, True, nbytes)
        free = Free(self._links_free, self._up_free, self._down_free)
        arrived_CR, free = Relayed(self._assignment, routes, Rates(*self.lines), at_R, nbytes, free).run()
        self._links_free, self._up_free, self._down_free = free
        for chunk in range(self._assignment.n_chunks):
            for sender, receiver, part_bytes in routes.deliveries(chunk, nbytes):
                self.sent_bytes[sender, receiver] += part_bytes
        return arrived_CR

    def send_back(self, at_CR: Array, nbytes: float) -> Array:
        """Send each reader's gradient of a chunk to the chunk's owner. Returns when it has arrived, [C, R]."""
        remote, size_CR = self.remote, nbytes * self._rows_CR
        order = np.argsort(np.where(remote, at_CR, np.inf), axis=0, kind="stable")
        ranks = np.arange(remote.shape[1])
        shared = self._turns(at_CR, size_CR, order)
        begins, ends = np.full(remote.shape, -np.inf), np.full(remote.shape, -np.inf)
        for place in range(int(remote.sum(0).max())):
            chunk = order[place]
            sends = remote[chunk, ranks]
            chunk, rank = chunk[sends], ranks[sends]
            owner = self._owner[chunk]
            begin = np.maximum(at_CR[chunk, rank], self._links_free[rank, owner])
            alone = begin + 8 * size_CR[chunk, rank] / self.lines.link_bps[rank, owner]
            end = np.maximum(alone, shared[chunk, rank])
            begins[chunk, rank], ends[chunk, rank] = begin, end
            self._links_free[rank, owner] = end
            self.sent_bytes[rank, owner] += size_CR[chunk, rank]
        self._up_free = np.maximum(self._up_free, np.where(remote, shared, -np.inf).max(0))
        latency_s = self.lines.latency_s.T[self._owner]
        return self._received(begins + latency_s, ends + latency_s, size_CR, self._to_owners)

    def hand_on(self, at_R: Array, nbytes: float, back: bool = False) -> Array:
        """Send θ of each chunk to the owner of the next (or its gradient back), behind earlier messages on that link.
        Returns when each rank has all of its own, [R]."""
        source, target = self._owner[:-1], self._owner[1:]
        source, target = (target, source) if back else (source, target)
        moves = source != target
        source, target = source[moves], target[moves]
        left = np.maximum(at_R[source], self._links_free[source, target])
        rate = np.minimum(self.lines.link_bps[source, target], self.lines.up_bps[source])
        there = left + 8 * nbytes / rate + self.lines.latency_s[source, target]
        np.add.at(self.sent_bytes, (source, target), nbytes)
        arrived = at_R.copy()
        np.maximum.at(arrived, target, there)
        return arrived

    def _turns(self, at_CR: Array, size_CR: Array, order: Indices) -> Array:
        """When the sending NICs have sent messages that are handed over one by one, links in turns."""
        through = np.where(self.remote, at_CR, -np.inf)
        up_bps = self.lines.up_bps
        if not np.isfinite(up_bps).any():
            return through
        for rank in np.flatnonzero(np.isfinite(up_bps)):
            came = order[: int(self.remote[:, rank].sum()), rank]
            starts = np.maximum(at_CR[came, rank], self._up_free[rank])
            through[came, rank] = shared_service(starts, 8 * size_CR[came, rank] / up_bps[rank])
        return through

    def _received(self, begins: Array, ends: Array, size_CR: Array, flows: Flows) -> Array:
        """When the receiving NICs are done with messages that arrive evenly from `begins` to `ends`, both [C, R]."""
        if not np.isfinite(self.lines.down_bps).any():
            return ends
        arrived = np.full_like(ends, -np.inf)
        for rank in np.flatnonzero(np.isfinite(self.lines.down_bps)):
            used = flows.used[:, rank]
            if not used.any():
                continue
            # The matrices are by [chunk, reader]: where owners receive, the peer is the reader.
            chunk, peer = flows.chunk[used, rank], flows.peer[used, rank]
            column = np.full_like(peer, rank) if flows is self._to_readers else peer
            service_s = 8 * size_CR[chunk, column] / self.lines.down_bps[rank]
            through, free = in_order(begins[chunk, column], ends[chunk, column], service_s, self._down_free[rank])
            arrived[chunk, column] = through
            self._down_free[rank] = free
        unlimited = ~np.isfinite(self.lines.down_bps)
        if unlimited.any():
            receiver = unlimited[None, :] if flows is self._to_readers else unlimited[self._owner][:, None]
            arrived = np.where(receiver, ends, arrived)
        return arrived


def shared_service(starts: Array, services_s: Array) -> Array:
    """Ends of services that begin at `starts` (rising), at one server whose rate is shared equally.

    Virtual time runs at 1 / (services under way): a service that starts at virtual time v is done at v + its length.
    """
    ends = np.empty_like(starts)
    now, virtual = 0.0, 0.0
    under_way: list[tuple[float, int]] = []

    def serve_until(time: float) -> None:
        nonlocal now, virtual
        while under_way:
            tag, first = under_way[0]
            left = (tag - virtual) * len(under_way)
            if now + left > time:
                virtual += (time - now) / len(under_way)
                break
            now, virtual = now + left, tag
            ends[first] = now
            heapq.heappop(under_way)

    for index, (start, service_s) in enumerate(zip(starts.tolist(), services_s.tolist(), strict=True)):
        serve_until(start)
        now = max(start, now)
        heapq.heappush(under_way, (virtual + service_s, index))
    serve_until(np.inf)
    return ends


def in_order(begins: Array, ends: Array, service_s: Array | float, free_at: float) -> tuple[Array, float]:
    """When a server that is busy until `free_at` is done with fluids that arrive evenly from `begins` to `ends`, served
    in order of arrival; and when it is free again."""
    ends = np.maximum(ends, begins + LEAST_S * np.maximum(1.0, np.abs(begins)) + LEAST_S)
    times = np.concatenate([begins, ends])
    slopes = service_s / (ends - begins)
    order = np.argsort(times, kind="stable")
    times, changes = times[order], np.concatenate([slopes, -slopes])[order]
    spans = np.diff(times, prepend=times[0])
    rates = np.concatenate([[0.0], np.cumsum(changes)[:-1]])
    excess = np.cumsum((rates - 1.0) * spans)
    queued_s = excess - np.minimum(np.minimum.accumulate(excess), -max(0.0, free_at - times[0]))
    place = np.empty(len(order), dtype=int)
    place[order] = np.arange(len(order))
    through = ends + queued_s[place[len(begins) :]]
    return through, float(times[-1] + queued_s[-1])


def _grouped(flows: list[list[tuple[int, int]]]) -> Flows:
    width = max(1, max(map(len, flows)))
    chunk, peer = np.zeros((width, len(flows)), dtype=int), np.zeros((width, len(flows)), dtype=int)
    used = np.zeros((width, len(flows)), dtype=bool)
    for rank, of_rank in enumerate(flows):
        for place, (one, other) in enumerate(of_rank):
            chunk[place, rank], peer[place, rank], used[place, rank] = one, other, True
    return Flows(chunk, peer, used)
