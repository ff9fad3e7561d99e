"""What this host can carry, measured, and whether it is enough for a profile.

A loopback that carries 10 Gbit/s cannot emulate 100, and a run must say so. `measure` sends through two real endpoints,
unshaped, in segments of the size that the profile would use. Both run in this process and share its interpreter, so the
figure is too low rather than too high. `warning` is shown before a run starts; `netem.verify` measures a profile in
detail.
"""

from __future__ import annotations

import threading
import time

from netem.endpoint import Endpoint
from netem.errors import IsthmusError
from netem.limits import MIB
from netem.profile import Profile
from netem.units import format_rate
from netem.verify.promise import mending_dilation

_DURATION_S = 0.15
_MESSAGE_BYTES = 4 * MIB
_TIMEOUT_S = 5.0


def warning(profile: Profile, nodes: int, *, links: int | None = None, measured_bps: float | None = None) -> str | None:
    """One sentence if this host cannot carry `profile` with `nodes` nodes on it, else None.

    `links` is the number of links that are busy at once; by default all, from each node to each other. In scope `nic`
    the number of NICs counts instead. With `measured_bps` nothing is measured, which would take about 0.3 s.
    """
    rate_bps = profile.rate_bps
    if rate_bps is None or nodes < 2:
        return None
    busy, what = (nodes, "NICs") if profile.scope == "nic" else (links or nodes * (nodes - 1), "links")
    asked_bps = rate_bps * busy
    if measured_bps is None:
        measured_bps = measure(profile)
    if measured_bps >= asked_bps:
        return None
    return (
        f"profile {profile.name} asks for {format_rate(rate_bps)} × {busy} {what} = {format_rate(asked_bps)} when all "
        f"are busy at once, and this host carries about {format_rate(float(f'{measured_bps:.2g}'))} over loopback; "
        "where the run needs more than that, its times are those of this host and not of the profile; slow the "
        f"emulated clock down with --net.dilation {mending_dilation(asked_bps, measured_bps) * profile.dilation:g}"
    )


def measure(profile: Profile) -> float:
    """Payload bits per second that one flow of segments carries between two endpoints over this host's loopback."""
    segment_bytes = profile.segment_bytes(profile.rate_bps)
    unshaped = Profile(name="measurement", segment_size_bytes=segment_bytes)
    receiver = _Sink()
    source = Endpoint("source", "measurement", unshaped, _Sink(), bind=None)
    try:
        sink = Endpoint("sink", "measurement", unshaped, receiver, bind="tcp://127.0.0.1:0")
        try:
            source.connect("sink", sink.address)
            return _measure(source, receiver)
        finally:
            sink.close()
    finally:
        source.close()


def _measure(source: Endpoint, receiver: _Sink) -> float:
    payload = bytes(_MESSAGE_BYTES)
    sent = 0

    def send() -> None:
        nonlocal sent
        source.send("sink", b"", [payload])
        sent += 1

    def wait() -> None:
        if not receiver.arrived.acquire(timeout=_TIMEOUT_S):
            raise IsthmusError(f"nothing arrived in {_TIMEOUT_S:g} s while the loopback was measured: {receiver.error}")

    send()
    wait()  # the connection is up
    send()
    send()
    start = time.monotonic()
    while time.monotonic() - start < _DURATION_S:
        send()
        wait()
    for _ in range(2):
        wait()
    return (sent - 1) * _MESSAGE_BYTES * 8 / (time.monotonic() - start)


class _Sink:
    """Receives everything into one buffer."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.error: IsthmusError | None = None
        self._buffer = memoryview(bytearray(_MESSAGE_BYTES))

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return self._buffer[:total_bytes]

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.arrived.release()

    def failed(self, error: IsthmusError) -> None:
        self.error = error
