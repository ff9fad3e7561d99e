"""One process of the wire's benchmark over plain ZeroMQ: `python -m node.lab.bench.raw_zmq tcp`.

It takes the commands of `netem.verify.child`. A message is one frame of at most 1 MiB after another on a PUSH socket
for each peer, without acknowledgement, credit, checksum or sequence number: what ZeroMQ does by itself.
"""

from __future__ import annotations

import threading
import time

import zmq

from netem.children import end_with_parent
from netem.limits import MIB
from netem.verify.child import Arrival, Connect, Open, Part, Transfer, Transferred, serve, sleep_until

_LINGER_MS = 0


class ZmqCarrier:
    """Carries through PUSH and PULL sockets. Each peer's sender is a socket of its own, and the first part of a frame
    names its source."""

    def __init__(self, command: Open) -> None:
        self._name = command.name.encode()
        self._context = zmq.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pull.linger = _LINGER_MS
        port = self._pull.bind_to_random_port(f"tcp://{command.host}")
        self.address = f"tcp://{command.host}:{port}"
        self._pushes: dict[str, zmq.Socket[bytes]] = {}
        self._payload = memoryview(bytearray(b"\2") * max(command.largest_bytes, 1))

    def connect(self, command: Connect) -> None:
        push = self._context.socket(zmq.PUSH)
        push.linger = _LINGER_MS
        push.connect(command.address)
        self._pushes[command.peer] = push

    def transfer(self, command: Transfer) -> Transferred:
        sender = threading.Thread(target=self._send, args=(command,))
        sender.start()
        left = {part.peer: part.nbytes * part.count for part in command.receives}
        arrivals: list[Arrival] = []
        deadline = command.at + command.timeout_s
        while left and self._pull.poll(max(0, round(1000 * (deadline - time.monotonic())))):
            source, data = self._pull.recv_multipart(copy=False)
            peer = source.bytes.decode()
            left[peer] -= len(data)
            if not left[peer]:
                del left[peer]
                arrivals.append(Arrival(peer, 0, time.monotonic()))
        sender.join()
        if left:
            raise OSError(f"a transfer did not end within {command.timeout_s:.0f} s")
        return Transferred(0, 0, arrivals)

    def close(self) -> None:
        for each in [*self._pushes.values(), self._pull]:
            each.close()
        self._context.term()

    def _send(self, command: Transfer) -> None:
        sleep_until(command.at)
        for start in range(0, max((_total(part) for part in command.sends), default=0), MIB):
            for part in command.sends:
                if start < _total(part):
                    data = self._payload[: min(MIB, _total(part) - start)]
                    self._pushes[part.peer].send_multipart([self._name, data], copy=False)


def _total(part: Part) -> int:
    return part.nbytes * part.count


if __name__ == "__main__":
    end_with_parent()
    serve(ZmqCarrier)
