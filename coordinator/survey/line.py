"""An endpoint with a queue, for host and guest of a survey. The I/O thread checks what comes and puts it on the queue,
with its time; nothing is allocated for what is not wanted."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import NamedTuple

from coordinator.messages import CONTROL_TAG, COORDINATOR, RUN_ID, Message, control_buffer, encode
from coordinator.survey.messages import Echoed, Probe, probe_tag, read_probe
from netem.door import DoorLimits
from netem.endpoint import Endpoint, unique
from netem.errors import IsthmusError, ProtocolError
from netem.keys import Access
from netem.limits import Limits
from netem.network import UNSHAPED
from netem.probe import MOST_BLOCK_BYTES

MOST_AT_ONCE = 1000


_EPOCH_S = time.time() - time.monotonic()


def clock_s() -> float:
    """The time of day as this machine has it, in seconds since 1970; it does not jump while a survey goes on."""
    return _EPOCH_S + time.monotonic()


class Body(NamedTuple):
    """A control message that has come."""

    peer: str
    body: memoryview
    seen_from: str


class Shot(NamedTuple):
    """A probe or an echo that has come."""

    peer: str
    probe: Probe | Echoed
    at_s: float


Arrival = Body | Shot | IsthmusError


class Line:
    """One endpoint of a survey. With `probes`, it takes probes from peers that it has dialled."""

    def __init__(self, name: str, bind: str, access: Access, limits: Limits, door: DoorLimits, *, probes: bool) -> None:
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._probes = probes
        self._scratch = memoryview(bytearray(MOST_BLOCK_BYTES))  # what a probe carries has no meaning
        self._payload = memoryview(bytearray(MOST_BLOCK_BYTES))
        wire_name = name if name == COORDINATOR else unique(name, access.pair.public)
        self.endpoint = Endpoint(wire_name, RUN_ID, UNSHAPED, self, bind=bind, limits=limits, access=access, door=door)

    def say(self, peer: str, message: Message) -> None:
        """Send a control message."""
        self.endpoint.send(peer, CONTROL_TAG, [encode(message)], urgent=True)

    def shoot(self, peer: str, probe: Probe, nbytes: int) -> None:
        """Send a probe."""
        self.endpoint.send(peer, probe_tag(probe), [self._payload[:nbytes]])

    def answer(self, peer: str, echo: Echoed) -> None:
        """Answer a probe, ahead of other probes on their way there."""
        self.endpoint.send(peer, probe_tag(echo), urgent=True)

    # Called by the I/O thread.

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        if (buffer := control_buffer(tag, total_bytes, peer)) is not None:
            return buffer
        if not self._probes or peer == COORDINATOR:
            raise ProtocolError("bulk, where only control messages are taken", peer=peer)
        read_probe(tag, peer)
        if total_bytes > MOST_BLOCK_BYTES:
            raise ProtocolError(f"a probe of {total_bytes} bytes, at most {MOST_BLOCK_BYTES} are allowed", peer=peer)
        return self._scratch[:total_bytes]

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        now_s = clock_s()
        if tag == CONTROL_TAG:
            self.arrivals.put(Body(peer, buffer, self.endpoint.seen_from(peer)))
        else:
            self.arrivals.put(Shot(peer, read_probe(tag, peer), now_s))

    def failed(self, error: IsthmusError) -> None:
        self.arrivals.put(error)


def take(line: Line, handle: Callable[[Arrival], None], until_s: float) -> None:
    """Wait for an arrival until this time, and handle it with what else is there."""
    try:
        handle(line.arrivals.get(timeout=max(0.0, until_s - clock_s())))
        for _ in range(MOST_AT_ONCE):  # a flood must not stop the clock
            handle(line.arrivals.get_nowait())
    except queue.Empty:
        return
