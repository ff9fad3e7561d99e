"""What this host can carry, measured, against what a profile asks of it.

An emulated 100 Gbit/s on a loopback that carries 10 is a lie unless it is said. `measure` sends through two real
endpoints, unshaped, in the segments that the profile would use; both run in this process and share its interpreter,
so the figure is rather low than high. `warning` is for whoever starts a run, before it starts; what a profile is
worth here in detail, `netem.verify` measures.
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

    `links` is how many links are busy at once: by default all, each node sending to each other. In scope `nic` a
    node sends no faster than its NIC. `measured_bps` spares the measurement (about 0.3 s).
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
        f"profile {profile.name} asks for {format_rate(rate_bps)} × {busy} {what} = {format_rate(asked_bps)} where all "
        f"are busy at once; this host carries about {format_rate(float(f'{measured_bps:.2g}'))} over loopback: "
        "where the run needs more than that, its times are this host's, not the profile's; slow the emulated clock "
        f"down with --net.dilation {mending_dilation(asked_bps, measured_bps) * profile.dilation:g}"
    )


def measure(profile: Profile) -> float:
    """Bits per second, payload, that one flow of segments carries from endpoint to endpoint on this host's loopback."""
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
            raise IsthmusError(f"the loopback measurement got nothing through in {_TIMEOUT_S:g} s: {receiver.error}")

    send()
    wait()  # connected and warm
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
