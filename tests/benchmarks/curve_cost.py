"""What encryption costs: CPU seconds for each GB from one endpoint to another, both ends together.

    python tests/benchmarks/curve_cost.py [--mb N] [--rate BIT_PER_S]

Sender and receiver are processes of their own on 127.0.0.1. "open" has no keys at all, "proof" is what members on one
machine do, "CURVE" is what members on several machines do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from netem.endpoint import Endpoint, unique
from netem.errors import IsthmusError
from netem.keys import Access, KeyPair, new_pair
from netem.limits import MIB, Limits
from netem.network import Profile
from netem.tables import markdown_table

LOCAL = "tcp://127.0.0.1:0"
MESSAGE_BYTES = 4 * MIB
WAYS = ("open", "proof", "CURVE")


class Receiver:
    """Takes everything into one buffer, and counts messages."""

    def __init__(self) -> None:
        self.count = 0
        self._buffer = memoryview(bytearray(MESSAGE_BYTES))

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return self._buffer[:total_bytes]

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.count += 1

    def failed(self, error: IsthmusError) -> None:
        raise AssertionError(error)


def end(way: str, name: str, pair: KeyPair, profile: Profile) -> tuple[Endpoint, Receiver]:
    access = None if way == "open" else Access(pair, way == "CURVE")
    inbox = Receiver()
    return Endpoint(name, "run", profile, inbox, bind=LOCAL, limits=Limits(), access=access), inbox


def play(way: str, names: list[str], pairs: list[KeyPair], who: int, profile: Profile, pipe: Connection) -> None:
    """One end: tell the address, dial the other, send or receive, and tell the CPU seconds."""
    endpoint, inbox = end(way, names[who], pairs[who], profile)
    pipe.send(endpoint.address)
    address, messages = pipe.recv()
    endpoint.share("shared")
    endpoint.connect(names[1 - who], address, key=pairs[1 - who].public, encrypted=way == "CURVE")
    if who == 0:
        endpoint.send(names[1], b"hello")
    else:
        while not inbox.count:
            time.sleep(0.01)
    pipe.send("ready")
    pipe.recv()
    cpu_s = sum(os.times()[:2])
    if who == 0:
        payload = bytes(MESSAGE_BYTES)
        for _ in range(messages):
            endpoint.send(names[1], b"bulk", [payload], timeout_s=600)
        assert endpoint.flush(600)
    else:
        while inbox.count <= messages:
            time.sleep(0.02)
    pipe.send(sum(os.times()[:2]) - cpu_s)
    pipe.recv()
    endpoint.close()


def measure(way: str, messages: int, profile: Profile) -> tuple[float, float]:
    """CPU seconds of both ends for each GB, and Gbit/s."""
    spawn = multiprocessing.get_context("spawn")
    pairs = [new_pair(), new_pair()]
    names = [unique(name, pair.public) for name, pair in zip("ab", pairs, strict=True)]
    pipes: list[Any] = []
    for who in range(2):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=play, args=(way, names, pairs, who, profile, theirs), daemon=True).start()
        pipes.append(ours)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe, address in zip(pipes, reversed(addresses), strict=True):
        pipe.send((address, messages))
    for pipe in pipes:
        pipe.recv()
    began = time.monotonic()
    for pipe in pipes:
        pipe.send("go")
    cpu_s = sum(pipe.recv() for pipe in pipes)
    took_s = time.monotonic() - began
    for pipe in pipes:
        pipe.send("end")
    gigabytes = messages * MESSAGE_BYTES / 1e9
    return cpu_s / gigabytes, 8 * gigabytes / took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="megabytes of each measurement (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="bits a second of the link; 0: unlimited (default)")
    options = parser.parse_args()
    profile = Profile(rate_bps=options.rate) if options.rate else Profile()
    messages = max(1, options.mb * 1_000_000 // MESSAGE_BYTES)
    rows = []
    for way in WAYS:
        cpu_s, gbps = measure(way, messages, profile)
        rows.append([way, f"{cpu_s:.2f}", f"{gbps:.2f}"])
    print(markdown_table(["callers", "CPU s/GB, both ends", "Gbit/s"], rows, align="lr"))


if __name__ == "__main__":
    main()
