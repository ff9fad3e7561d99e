"""A world of ranks as threads of one process, joined by real endpoints on 127.0.0.1."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from coordinator.assignment import Assignment
from netem.endpoint import Endpoint
from netem.profile import Profile
from node.config import Config
from node.exchange.inbox import Inbox, Members
from node.exchange.wire import Wire
from node.train.from_config import payload_format

T = TypeVar("T")
TIMEOUT_S = 60.0
UNSHAPED = Profile()


@dataclass
class Rank:
    """One rank's way to the others."""

    number: int
    wire: Wire | None
    endpoint: Endpoint


def run_over_sockets(
    config: Config,
    assignment: Assignment,
    work: Callable[[Rank], T],
    profile: Profile = UNSHAPED,
    relays: bool = False,
) -> list[T]:
    """Run `work(rank)` on every rank at once, over sockets; results by rank."""
    payload = payload_format(config)
    names = tuple(f"node-{rank}" for rank in range(assignment.n_ranks))
    inboxes = [Inbox(payload, ring_cap_bytes=64 << 20) for _ in names]
    endpoints = [
        Endpoint(name, "test", profile, inbox, bind="tcp://127.0.0.1:0")
        for name, inbox in zip(names, inboxes, strict=True)
    ]
    try:
        ranks = []
        for rank, (endpoint, inbox) in enumerate(zip(endpoints, inboxes, strict=True)):
            endpoint.set_generation(1)
            for peer, other in zip(names, endpoints, strict=True):
                if other is not endpoint:
                    endpoint.connect(peer, other.address)
            members = Members(1, assignment, rank, names, relays)
            inbox.enter(members)
            wire = Wire(endpoint, inbox, members, payload, TIMEOUT_S)
            ranks.append(Rank(rank, wire if len(names) > 1 else None, endpoint))
        with ThreadPoolExecutor(len(names)) as pool:
            return [future.result(timeout=2 * TIMEOUT_S) for future in [pool.submit(work, rank) for rank in ranks]]
    finally:
        for endpoint in endpoints:
            endpoint.flush(5.0)
            endpoint.close()
