"""Two endpoints on this machine, joined by an emulated link of 300 Mbit/s and 25 ms, and how long 8 MB take on it.

This uses `netem` alone: no coordinator, no model, no torch. Run it with `python examples/shape_a_link.py`.
"""

from __future__ import annotations

import queue
import time

from netem.endpoint import Endpoint
from netem.errors import IsthmusError
from netem.profile import NetConfig, resolve

PAYLOAD_BYTES = 8_000_000
RATE_BPS = 300e6
LATENCY_S = 0.025
ANY_PORT = "tcp://127.0.0.1:0"


class Mailbox:
    """The receiver that an endpoint calls from its I/O thread. No method may block."""

    def __init__(self) -> None:
        self.arrivals: queue.SimpleQueue[tuple[bytes, float]] = queue.SimpleQueue()

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview:
        """A message begins: lend a buffer for its payload."""
        return memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        """The message is complete."""
        self.arrivals.put((tag, time.monotonic()))

    def failed(self, error: IsthmusError) -> None:
        """A peer broke the protocol or fell silent. With two endpoints of our own this cannot happen."""
        raise error

    def next(self) -> tuple[bytes, float]:
        return self.arrivals.get(timeout=30)


def main() -> None:
    # `profile` may also be a built-in name such as "transatlantic", or the path of a TOML file.
    profile = resolve(NetConfig(profile="unshaped", rate="300 Mbit/s", latency="25 ms"))
    alice_mail, bob_mail = Mailbox(), Mailbox()
    alice = Endpoint("alice", "example", profile, alice_mail, bind=ANY_PORT)
    bob = Endpoint("bob", "example", profile, bob_mail, bind=ANY_PORT)
    try:
        alice.connect("bob", bob.address)
        alice.send("bob", b"hello")
        bob_mail.next()  # they have met, so that connecting is not in the measured time

        payload = bytes(PAYLOAD_BYTES)
        began = time.monotonic()
        alice.send("bob", b"payload", [payload])
        _, arrived = bob_mail.next()
        link = alice.counters()["bob"]
    finally:
        alice.close()
        bob.close()

    expected_s = 8 * PAYLOAD_BYTES / RATE_BPS + LATENCY_S
    print(f"network     {profile}")
    print(f"measured    {1e3 * (arrived - began):.1f} ms from `send` to the last byte")
    print(f"arithmetic  {1e3 * expected_s:.1f} ms: 8 bits x {PAYLOAD_BYTES:,} bytes / 300 Mbit/s + 25 ms")
    print(f"on the wire {link.wire_bytes:,} bytes, headers included")


if __name__ == "__main__":
    main()
