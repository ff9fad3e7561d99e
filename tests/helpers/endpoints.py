"""Endpoints on 127.0.0.1 for tests, and a receiver that notes what it is told."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from netem.endpoint import Endpoint
from netem.errors import IsthmusError, ProtocolError
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile

LOCAL = "tcp://127.0.0.1:0"
PATIENCE_S = 30.0


class Delivery(NamedTuple):
    peer: str
    generation: int
    tag: bytes
    buffer: memoryview
    at: float


class Inbox:
    """A `Receiver`. Buffers of a size are made before they are needed, so that tests time the network alone."""

    def __init__(self) -> None:
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.errors: queue.SimpleQueue[IsthmusError] = queue.SimpleQueue()
        self.refuse: bytes | None = None
        self._ready: dict[int, bytearray] = {}

    def prepare(self, nbytes: int) -> None:
        """All messages of this size share one buffer, whose pages are there."""
        self._ready[nbytes] = bytearray(b"\1" * nbytes)

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        if tag == b"nonsense":
            raise ProtocolError("a tag that means nothing", peer=peer, generation=generation)
        if tag == self.refuse:
            return None
        return memoryview(self._ready.get(total_bytes) or bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.deliveries.put(Delivery(peer, generation, tag, buffer, time.monotonic()))

    def failed(self, error: IsthmusError) -> None:
        self.errors.put(error)

    def next(self, timeout_s: float = PATIENCE_S) -> Delivery:
        return self.deliveries.get(timeout=timeout_s)

    def next_error(self, timeout_s: float = PATIENCE_S) -> IsthmusError:
        return self.errors.get(timeout=timeout_s)


@contextmanager
def network(
    *names: str, profile: Profile = UNSHAPED, limits: Limits | None = None
) -> Iterator[tuple[dict[str, Endpoint], dict[str, Inbox]]]:
    """Endpoints that are connected each to each and have met, with their inboxes."""
    inboxes = {name: Inbox() for name in names}
    endpoints: dict[str, Endpoint] = {}
    try:
        for name in names:
            endpoints[name] = Endpoint(name, "run", profile, inboxes[name], bind=LOCAL, limits=limits or Limits())
        for source in names:
            for target in names:
                if source != target:
                    endpoints[source].connect(target, endpoints[target].address)
                    endpoints[source].send(target, b"hello")
        for name in names:
            for _ in range(len(names) - 1):
                assert inboxes[name].next().tag == b"hello"
            assert endpoints[name].flush(PATIENCE_S)
        yield endpoints, inboxes
    finally:
        for endpoint in endpoints.values():
            endpoint.close()


@contextmanager
def endpoint(
    name: str, *, bind: str | None = LOCAL, run_id: str = "run", **kwargs: object
) -> Iterator[tuple[Endpoint, Inbox]]:
    inbox = Inbox()
    opened = Endpoint(name, run_id, UNSHAPED, inbox, bind=bind, **kwargs)  # type: ignore[arg-type]
    try:
        yield opened, inbox
    finally:
        opened.close()


def eventually(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
