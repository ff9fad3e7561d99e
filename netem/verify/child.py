"""One process of a measurement: it sends and receives on command, and records times.

Usage: python -m netem.verify.child endpoint | tcp | busy. Commands are JSON lines on standard input, each is answered
by one line, and the process ends with its input; `netem.verify.party` is the other side. `endpoint` carries messages
through `netem.endpoint`, `tcp` through plain sockets, as the reference under the kernel's shaping. `busy` keeps one
core busy until it is stopped. Times are those of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from netem.children import end_with_parent
from netem.endpoint import Endpoint
from netem.errors import IsthmusError
from netem.limits import Limits
from netem.profile import Profile

_SPIN_S = 0.002  # the last part of a wait, for which `sleep` is too coarse
_HELLO = b"hello"


class Open(msgspec.Struct, tag="open"):
    """Listen at `host`, and allocate buffers for payloads of up to `largest_bytes`. Answered by `Opened`."""

    name: str
    host: str
    profile: Profile
    largest_bytes: int


class Connect(msgspec.Struct, tag="connect"):
    """Dial `peer` with this number of `flows`, and wait for its answer. Answered by `Done`."""

    peer: str
    address: str
    flows: int


class Part(msgspec.Struct, array_like=True):
    """`count` messages of `nbytes` each in one flow, to or from a peer."""

    peer: str
    flow: int
    nbytes: int
    count: int = 1


class Transfer(msgspec.Struct, tag="transfer"):
    """At time `at` send all of `sends`, then wait for `receives` messages. Answered by `Transferred`."""

    at: float
    sends: list[Part]
    receives: list[Part]
    timeout_s: float


class Opened(msgspec.Struct, tag="opened"):
    address: str


class Done(msgspec.Struct, tag="done"):
    pass


class Arrival(msgspec.Struct, array_like=True):
    """The last message of a flow arrived at time `at`."""

    peer: str
    flow: int
    at: float


class Transferred(msgspec.Struct, tag="transferred"):
    """The result. `wire_bytes` counts what was sent with all headers; it is 0 for TCP, where the kernel counts."""

    wire_bytes: int
    resent_bytes: int
    arrivals: list[Arrival]


class Failed(msgspec.Struct, tag="failed"):
    reason: str


Command = Open | Connect | Transfer
Answer = Opened | Done | Transferred | Failed


class Carrier(Protocol):
    """Carries messages to the peers."""

    address: str

    def connect(self, command: Connect) -> None:
        """Dial, and return when the peer has answered."""

    def transfer(self, command: Transfer) -> Transferred:
        """Send and receive as the command says; returns when all has arrived."""

    def close(self) -> None:
        """End all threads."""


class EndpointCarrier:
    """Carries through an endpoint. It is its own receiver, and takes all messages into one buffer."""

    def __init__(self, command: Open) -> None:
        self._arrived: queue.SimpleQueue[tuple[str, bytes, float]] = queue.SimpleQueue()
        self._into = memoryview(bytearray(b"\1") * max(command.largest_bytes, 1))
        self._payload = memoryview(bytearray(b"\2") * max(command.largest_bytes, 1))
        self._endpoint = Endpoint(
            command.name, "verify", command.profile, self, bind=f"tcp://{command.host}:0", limits=Limits()
        )
        self.address = self._endpoint.address

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return self._into[:total_bytes]

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        if tag != _HELLO:
            self._arrived.put((peer, tag, time.monotonic()))

    def failed(self, error: IsthmusError) -> None:
        print(error, file=sys.stderr, flush=True)

    def connect(self, command: Connect) -> None:
        self._endpoint.connect(command.peer, command.address)
        self._endpoint.send(command.peer, _HELLO)
        if not self._endpoint.flush(30.0):
            raise IsthmusError(f"{command.peer} at {command.address} does not answer")

    def transfer(self, command: Transfer) -> Transferred:
        before_bytes, before_resent_bytes = self._counted()
        sleep_until(command.at)
        for round_ in range(max((part.count for part in command.sends), default=0)):
            for part in command.sends:
                if round_ < part.count:
                    self._endpoint.send(part.peer, b"%d" % part.flow, [self._payload[: part.nbytes]], flow=part.flow)
        last: dict[tuple[str, int], float] = {}
        deadline = command.at + command.timeout_s
        for _ in range(sum(part.count for part in command.receives)):
            try:
                peer, tag, at = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise IsthmusError(f"a transfer did not end within {command.timeout_s:.0f} s") from None
            last[peer, int(tag)] = at
        if not self._endpoint.flush(command.timeout_s):
            raise IsthmusError(f"a transfer was not acknowledged within {command.timeout_s:.0f} s")
        after_bytes, after_resent_bytes = self._counted()
        return Transferred(
            after_bytes - before_bytes,
            after_resent_bytes - before_resent_bytes,
            [Arrival(peer, flow, at) for (peer, flow), at in last.items()],
        )

    def close(self) -> None:
        self._endpoint.close()

    def _counted(self) -> tuple[int, int]:
        links = self._endpoint.counters().values()
        return sum(link.wire_bytes for link in links), sum(link.resent_bytes for link in links)


class TcpCarrier:
    """Carries through plain sockets, one connection per flow. The side that dials sends; the one that listens reads."""

    def __init__(self, command: Open) -> None:
        self._listener = socket.create_server((command.host, 0))
        self._listener.settimeout(30.0)
        self._payload = memoryview(bytearray(b"\2") * max(command.largest_bytes, 1))
        self._flows: dict[int, socket.socket] = {}
        self.address = f"tcp://{command.host}:{self._listener.getsockname()[1]}"

    def connect(self, command: Connect) -> None:
        host, _, port = command.address.removeprefix("tcp://").rpartition(":")
        for flow in range(command.flows):
            connection = socket.create_connection((host, int(port)), timeout=30.0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(bytes([flow]))
            self._flows[flow] = connection

    def transfer(self, command: Transfer) -> Transferred:
        for part in command.receives:
            while part.flow not in self._flows:
                connection = self._listener.accept()[0]
                self._flows[connection.recv(1)[0]] = connection
        arrivals: list[Arrival] = []
        faults: list[OSError] = []

        def work(part: Part, sending: bool) -> None:
            connection = self._flows[part.flow]
            connection.settimeout(command.timeout_s)
            try:
                if sending:
                    sleep_until(command.at)
                    connection.sendall(self._payload[: part.nbytes])
                else:
                    _read(connection, part.nbytes)
                    arrivals.append(Arrival(part.peer, part.flow, time.monotonic()))
            except OSError as error:
                faults.append(error)

        jobs = [(part, True) for part in command.sends] + [(part, False) for part in command.receives]
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise IsthmusError(f"a TCP transfer failed: {faults[0]}")
        return Transferred(0, 0, arrivals)

    def close(self) -> None:
        for connection in [*self._flows.values(), self._listener]:
            connection.close()


def main() -> None:
    """Carry out commands until the input ends."""
    end_with_parent()
    kind = sys.argv[1]
    if kind == "busy":
        _spin()
        return
    carriers: dict[str, type[EndpointCarrier] | type[TcpCarrier]] = {"endpoint": EndpointCarrier, "tcp": TcpCarrier}
    serve(carriers[kind])


def serve(make: Callable[[Open], Carrier]) -> None:
    """Carry out commands until the input ends; `make` makes the carrier that the first command opens."""
    carrier: Carrier | None = None
    try:
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=Command)
            answer: Answer
            try:
                if isinstance(command, Open):
                    carrier = make(command)
                    answer = Opened(carrier.address)
                elif carrier is None:
                    raise IsthmusError("the first command has to be open")
                elif isinstance(command, Connect):
                    carrier.connect(command)
                    answer = Done()
                else:
                    answer = carrier.transfer(command)
            except (IsthmusError, OSError) as error:
                answer = Failed(str(error))
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()
    finally:
        if carrier is not None:
            carrier.close()


def _spin() -> None:
    while True:
        pass


def sleep_until(at: float) -> None:
    """Wait until a time of the monotonic clock, to some microseconds."""
    time.sleep(max(0.0, at - time.monotonic() - _SPIN_S))
    while time.monotonic() < at:
        pass


def _read(connection: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytearray(min(nbytes, 1 << 20)))
    while nbytes:
        got = connection.recv_into(buffer[: min(nbytes, len(buffer))])
        if not got:
            raise ConnectionError("the other side has closed")
        nbytes -= got


if __name__ == "__main__":
    main()
