"""Evidence: memory stays flat while a peer reads more slowly than the network carries, for ten minutes.

    python tests/benchmarks/soak.py [--minutes N] [--out docs/netem/soak.md]        Linux

Two processes, `internet-300mbps` between them. One sends messages of 1 MB, each in memory of its own, as fast as `send`
takes them; at most 64 MB may wait. The other's I/O thread sleeps for 0.2 s over each message, so it reads a seventh of
what the network would carry, and once a minute it is stopped for 5 s (SIGSTOP), as a process that hangs. What a
process holds is its resident set, read every second. Each message bears its number and is filled with a byte made from
it: both are checked where it arrives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from ctypes import c_int64
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from netem.endpoint import Endpoint
from netem.errors import IsthmusError, QueueFull
from netem.limits import Limits
from netem.profile import NetConfig, resolve

PROFILE = resolve(NetConfig(profile="internet-300mbps"))
MESSAGE_BYTES = 1_000_000
QUEUE_BYTES = 64 * MESSAGE_BYTES
READ_S = 0.2
STOP_EVERY_S, STOP_S = 60.0, 5.0
SAMPLE_S = 1.0
SETTLED_S = 60.0  # interpreter, libraries and buffers are all there by then
PATIENCE_S = 60.0
MB = 1e6

PAGE = """\
# Memory under a peer that reads slowly

Written by `python tests/benchmarks/soak.py --minutes {minutes:g}`, whose head says what is done; {host}.

| after | sender holds | reader holds | read so far |
|---|---|---|---|
{table}

From the second minute on the sender's memory grows by {slopes[0]:+.2f} MB a minute, the reader's by {slopes[1]:+.2f}
(least squares over a sample a second); the most seen is {most[0]:.1f} and {most[1]:.1f} MB. Messages of
{queue_mb:.0f} MB may wait at the sender, and {window_mb:.1f} MB be on the way.

In {seconds:.0f} s the network would have carried {carried_mb:,.0f} MB. The reader took {taken:,} messages of 1 MB
of {sent:,} sent, {wrong} of them out of order or damaged. Sent again, because a stopped reader does not acknowledge:
{resent_mb:.2f} MB. The endpoints reported: {reports}.
"""


class Sample(NamedTuple):
    at_s: float
    sender_bytes: int
    reader_bytes: int
    taken: int


class Result(NamedTuple):
    """What the two processes say in the end."""

    sent: int
    resent_bytes: int
    taken: int
    wrong: int
    reports: list[str]


class Slow:
    """Takes messages, each into a buffer that is given up again, and its time over them."""

    def __init__(self, count: Callable[[int], None]) -> None:
        self.wrong = 0
        self.reports: list[str] = []
        self._taken = 0
        self._count = count

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.wrong += int(tag) != self._taken or buffer != _payload(self._taken)
        self._taken += 1
        self._count(self._taken)
        time.sleep(READ_S)  # which no receiver may do: it is what is tried here

    def failed(self, error: IsthmusError) -> None:
        self.reports.append(str(error))


def _payload(number: int) -> bytes:
    return bytes([number % 251]) * MESSAGE_BYTES


def _endpoint(name: str, receiver: Slow, bind: str | None) -> Endpoint:
    return Endpoint(name, "soak", PROFILE, receiver, bind=bind, limits=Limits(max_queued_bytes=QUEUE_BYTES))


def read(out: Connection, over: Event, taken: Synchronized[int]) -> None:
    """The process that reads. It says its address first, and what was wrong in the end."""

    def count(messages: int) -> None:
        taken.value = messages

    receiver = Slow(count)
    endpoint = _endpoint("reader", receiver, "tcp://127.0.0.1:0")
    out.send(endpoint.address)
    over.wait()
    endpoint.close()
    out.send((receiver.wrong, receiver.reports))


def send(out: Connection, over: Event, address: str) -> None:
    """The process that sends. It says how much that was in the end, once all of it has been acknowledged."""
    receiver = Slow(lambda messages: None)
    endpoint = _endpoint("sender", receiver, None)
    endpoint.connect("reader", address)
    sent = 0
    while not over.is_set():
        try:
            endpoint.send("reader", b"%d" % sent, [_payload(sent)], timeout_s=SAMPLE_S)
        except QueueFull:
            continue
        sent += 1
    if not endpoint.flush(PATIENCE_S):
        receiver.reports.append(f"not all was acknowledged within {PATIENCE_S:g} s")
    resent_bytes = endpoint.counters()["reader"].resent_bytes
    endpoint.close()
    out.send((sent, resent_bytes, receiver.reports))


def soak(seconds: float) -> tuple[list[Sample], Result]:
    """Run both processes for `seconds`, and until all that was sent has been read."""
    spawn = multiprocessing.get_context("spawn")
    over = {"sender": spawn.Event(), "reader": spawn.Event()}
    pipes = {name: spawn.Pipe(duplex=False) for name in over}
    taken: Synchronized[int] = spawn.Value(c_int64, lock=True)
    reader = spawn.Process(target=read, args=(pipes["reader"][1], over["reader"], taken), daemon=True)
    reader.start()
    processes = [reader]
    try:
        address = _hear(pipes["reader"][0])
        sender = spawn.Process(target=send, args=(pipes["sender"][1], over["sender"], address), daemon=True)
        sender.start()
        processes.append(sender)
        assert sender.pid is not None
        assert reader.pid is not None
        samples = _watch(sender.pid, reader.pid, seconds, taken)
        over["sender"].set()
        sent, resent_bytes, reports = _hear(pipes["sender"][0])
        over["reader"].set()
        wrong, more = _hear(pipes["reader"][0])
        return samples, Result(sent, resent_bytes, taken.value, wrong, reports + more)
    finally:
        for process in processes:
            process.kill()  # ended long ago, where all went well
            process.join(PATIENCE_S)


def _watch(sender: int, reader: int, seconds: float, taken: Synchronized[int]) -> list[Sample]:
    """Sample both, and stop the reader now and then."""
    samples: list[Sample] = []
    began, stopped = time.monotonic(), False
    while (at_s := time.monotonic() - began) < seconds:
        # What is in shared memory is read past its lock, which a stopped process may hold.
        samples.append(Sample(at_s, resident_bytes(sender), resident_bytes(reader), taken.get_obj().value))
        stop = at_s % STOP_EVERY_S > STOP_EVERY_S - STOP_S
        if stop != stopped:
            os.kill(reader, signal.SIGSTOP if stop else signal.SIGCONT)
            stopped = stop
        time.sleep(SAMPLE_S)
    os.kill(reader, signal.SIGCONT)
    return samples


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(2 * PATIENCE_S):
        raise TimeoutError(f"a process says nothing for {2 * PATIENCE_S:g} s")
    return pipe.recv()


def resident_bytes(pid: int) -> int:
    """What of a process is in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def page(minutes: float, samples: Sequence[Sample], result: Result) -> str:
    """All that was measured, as Markdown."""
    from node.lab.study.trial import host_line  # not in the processes that are measured: it brings torch along

    settled = [sample for sample in samples if sample.at_s >= SETTLED_S] or list(samples)
    minute = [sample.at_s / 60 for sample in settled]
    columns = [[sample.sender_bytes / MB for sample in settled], [sample.reader_bytes / MB for sample in settled]]
    rows = [samples[0], *(min(samples, key=lambda one: abs(one.at_s - 60 * at)) for at in range(1, int(minutes) + 1))]
    window_bytes = PROFILE.credit_bytes("sender", "reader")
    assert PROFILE.rate_bps is not None
    return PAGE.format(
        minutes=minutes,
        host=host_line(),
        table="\n".join(
            f"| {one.at_s:.0f} s | {one.sender_bytes / MB:.1f} MB | {one.reader_bytes / MB:.1f} MB | {one.taken:,} MB |"
            for one in rows
        ),
        slopes=[statistics.linear_regression(minute, column).slope for column in columns],
        most=[max(column) for column in columns],
        queue_mb=QUEUE_BYTES / MB,
        window_mb=window_bytes / MB,
        seconds=samples[-1].at_s,
        carried_mb=samples[-1].at_s * PROFILE.rate_bps / 8 / MB,
        taken=result.taken,
        sent=result.sent,
        wrong=result.wrong or "none",
        resent_mb=result.resent_bytes / MB,
        reports="; ".join(result.reports) or "nothing",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory under a peer that reads slowly.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a Markdown file to write, too")
    options = parser.parse_args()
    text = page(options.minutes, *soak(60 * options.minutes))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
