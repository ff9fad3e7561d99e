"""Evidence: what the transport costs beside raw ZeroMQ, in CPU seconds for each GB and in Gbit/s.

    python tests/benchmarks/transport_cost.py [--rounds N] [--out docs/benchmarks/transport-cost.md]

Two processes on the loopback for each carrier: a raw DEALER that sends to a raw ROUTER, our endpoint without shaping,
and our endpoint with a shaper whose rate is so high that it never waits. All send the same segments of the same
messages, and all copy what arrives into the memory of a message. The raw pair has no numbers, acknowledgements,
checksums, credit in bytes or resends; its high-water mark bounds the segments in flight. The last three cases send at
300 Mbit/s, where every process sleeps and wakes for nearly every segment; there the raw sender sleeps until each
segment is due.

The carriers take turns. CPU seconds are user and system time of all threads of both processes, from the first send to
the last arrival (at the sender: to its acknowledgement).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Semaphore
from typing import Any, NamedTuple

import zmq

from netem.endpoint import Endpoint
from netem.errors import IsthmusError
from netem.limits import COPY_BYTES, KIB, MIB
from netem.network import Profile
from netem.tables import markdown_table

MESSAGE_BYTES = 4 * MIB
FAST_BYTES, PACED_BYTES = 256 * MIB, 32 * MIB
WINDOW_BYTES = 32 * MIB  # that of an endpoint without a rate
PACED_BPS = 300e6
NEVER_WAITS_BPS = 1e12
RAW_HEADER = bytes(64)
PATIENCE_S = 120.0

PAGE = """\
# What the transport costs beside raw ZeroMQ

Written by `python tests/benchmarks/transport_cost.py --rounds {rounds} --out docs/benchmarks/transport-cost.md`; the
head of that file says what is measured. {host}; {load} at the start. Medians of {rounds} rounds in which the carriers
take turns. Ratios are medians of the ratios within a round, to the raw pair with the same segments and pace.

{table}

"Sent" is all that the sender put on the wire over the payload: headers and tags. "Frames back" counts what the reader
sent, which is acknowledgements only.

```json
{record}
```
"""


class Case(NamedTuple):
    """One carrier. Without a profile it is the raw pair."""

    name: str
    segment_bytes: int
    profile: Profile | None
    paced: bool = False

    @property
    def total_bytes(self) -> int:
        return PACED_BYTES if self.paced else FAST_BYTES


class Run(NamedTuple):
    """One transfer."""

    took_s: float
    sender_s: float
    reader_s: float
    sent_share: float
    """Wire bytes over payload bytes; 0 where they are not counted."""
    frames_back: int

    @property
    def cpu_s(self) -> float:
        return self.sender_s + self.reader_s


def cases() -> list[Case]:
    """All carriers, in the order of the table."""
    found = []
    for size in (64 * KIB, MIB):
        found += [
            Case("raw ZeroMQ", size, None),
            Case("endpoint, unshaped", size, Profile(segment_size_bytes=size)),
            Case("endpoint, shaped, never waits", size, Profile(rate_bps=NEVER_WAITS_BPS, segment_size_bytes=size)),
        ]
    paced = Profile(rate_bps=PACED_BPS)
    return [
        *found,
        Case("raw ZeroMQ, 300 Mbit/s", 64 * KIB, None, paced=True),
        Case("endpoint, 300 Mbit/s a link", 64 * KIB, paced, paced=True),
        Case("endpoint, 300 Mbit/s a NIC", 64 * KIB, Profile(scope="nic", rate_bps=PACED_BPS), paced=True),
    ]


class Sink:
    """Takes all messages into one buffer."""

    def __init__(self) -> None:
        self.arrived = Semaphore(0)
        self.buffer = memoryview(bytearray(b"\1" * MESSAGE_BYTES))

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return self.buffer[:total_bytes]

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.arrived.release()

    def failed(self, error: IsthmusError) -> None:
        raise error


def read(pipe: Connection, case: Case) -> None:
    """The process that receives. It says its address, and after each transfer its CPU seconds and frames sent."""
    with (read_raw if case.profile is None else read_endpoint)(case) as (address, take, frames):
        pipe.send(address)
        while pipe.recv():
            before, frames_before = time.process_time(), frames()
            pipe.send("ready")
            take()
            spent_s = time.process_time() - before
            pipe.recv()  # the sender has its last acknowledgement
            pipe.send((spent_s, frames() - frames_before))


Reader = tuple[str, Callable[[], None], Callable[[], int]]


@contextmanager
def read_endpoint(case: Case) -> Iterator[Reader]:
    sink = Sink()
    assert case.profile is not None
    endpoint = Endpoint("reader", "cost", case.profile, sink, bind="tcp://127.0.0.1:0")

    def take() -> None:
        for _ in range(case.total_bytes // MESSAGE_BYTES):
            assert sink.arrived.acquire(timeout=PATIENCE_S)

    yield endpoint.address, take, lambda: sum(link.segments for link in endpoint.counters().values())
    endpoint.close()


@contextmanager
def read_raw(case: Case) -> Iterator[Reader]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.rcvhwm = WINDOW_BYTES // case.segment_bytes
        router.linger = 0
        router.bind("tcp://127.0.0.1:0")
        buffer = memoryview(bytearray(b"\1" * MESSAGE_BYTES))

        def take() -> None:
            at = 0
            for _ in range(case.total_bytes // case.segment_bytes):
                name, _, payload = router.recv_multipart(copy=False)
                buffer[at : at + case.segment_bytes] = payload.buffer
                at = (at + case.segment_bytes) % MESSAGE_BYTES
            router.send_multipart([name.bytes, b"all"])

        yield str(router.last_endpoint.rstrip(b"\0"), "ascii"), take, lambda: 0


def send(pipe: Connection, case: Case, address: str) -> None:
    """The process that sends. For each transfer it says how long it took, its CPU seconds and what it sent."""
    with (send_raw if case.profile is None else send_endpoint)(case, address) as (give, wire_bytes):
        while pipe.recv():
            wire_before, before, began = wire_bytes(), time.process_time(), time.monotonic()
            give()
            took_s, spent_s = time.monotonic() - began, time.process_time() - before
            pipe.send((took_s, spent_s, (wire_bytes() - wire_before) / case.total_bytes))


Sender = tuple[Callable[[], None], Callable[[], int]]


@contextmanager
def send_endpoint(case: Case, address: str) -> Iterator[Sender]:
    assert case.profile is not None
    endpoint = Endpoint("sender", "cost", case.profile, Sink(), bind=None)
    endpoint.connect("reader", address)
    payload = bytes(b"\2" * MESSAGE_BYTES)

    def give() -> None:
        for _ in range(case.total_bytes // MESSAGE_BYTES):
            endpoint.send("reader", b"", [payload])
        assert endpoint.flush(PATIENCE_S)

    yield give, lambda: sum(link.wire_bytes for link in endpoint.counters().values())
    endpoint.close()


@contextmanager
def send_raw(case: Case, address: str) -> Iterator[Sender]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.sndhwm = WINDOW_BYTES // case.segment_bytes
        dealer.linger = 0
        dealer.connect(address)
        payload = memoryview(bytes(b"\2" * MESSAGE_BYTES))
        segment_s = 8 * case.segment_bytes / PACED_BPS if case.paced else 0.0

        def give() -> None:
            due = time.monotonic()
            at = 0
            for _ in range(case.total_bytes // case.segment_bytes):
                due += segment_s
                if segment_s:
                    time.sleep(max(0.0, due - time.monotonic()))
                dealer.send(RAW_HEADER, zmq.SNDMORE)
                dealer.send(payload[at : at + case.segment_bytes], copy=case.segment_bytes <= COPY_BYTES)
                at = (at + case.segment_bytes) % MESSAGE_BYTES
            dealer.recv()

        yield give, lambda: 0


class Pair:
    """The two processes of a case."""

    def __init__(self, case: Case, stack: ExitStack) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes = []
        more: tuple[Any, ...] = ()
        for work in (read, send):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(theirs, case, *more), daemon=True)
            process.start()
            stack.callback(process.join, PATIENCE_S)
            stack.callback(ours.send, None)
            self._pipes.append(ours)
            if work is read:
                more = (self._hear(ours),)

    def run(self) -> Run:
        reader, sender = self._pipes
        reader.send(True)
        self._hear(reader)
        sender.send(True)
        took_s, sender_s, sent_share = self._hear(sender)
        reader.send(True)
        reader_s, frames_back = self._hear(reader)
        return Run(took_s, sender_s, reader_s, sent_share, frames_back)

    @staticmethod
    def _hear(pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE_S):
            raise TimeoutError(f"a process says nothing for {PATIENCE_S:g} s")
        return pipe.recv()


def measure(rounds: int) -> dict[Case, list[Run]]:
    """All cases by turn, and a round before that does not count."""
    with ExitStack() as stack:
        pairs = {case: Pair(case, stack) for case in cases()}
        runs: dict[Case, list[Run]] = {case: [] for case in pairs}
        for turn in range(rounds + 1):
            for case, pair in pairs.items():
                run = pair.run()
                if turn:
                    runs[case].append(run)
        return runs


def figures(runs: dict[Case, list[Run]]) -> list[dict[str, object]]:
    """Medians, and the ratio to the raw pair of the same segments and pace."""
    raw = {(case.segment_bytes, case.paced): runs[case] for case in runs if case.profile is None}
    found: list[dict[str, object]] = []
    for case, those in runs.items():
        beside = raw[case.segment_bytes, case.paced]
        ratio = statistics.median(one.cpu_s / other.cpu_s for one, other in zip(those, beside, strict=True))
        found.append(
            {
                "carrier": case.name,
                "segment_bytes": case.segment_bytes,
                "gbps": statistics.median(case.total_bytes * 8 / one.took_s for one in those) / 1e9,
                "sender_s_per_gb": statistics.median(one.sender_s for one in those) / case.total_bytes * 1e9,
                "reader_s_per_gb": statistics.median(one.reader_s for one in those) / case.total_bytes * 1e9,
                "cpu_to_raw": ratio,
                "sent_share": statistics.median(one.sent_share for one in those),
                "frames_back": statistics.median(one.frames_back for one in those),
                "frames": case.total_bytes // case.segment_bytes,
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = ["carrier", "segments", "Gbit/s", "CPU s/GB: sender", "reader", "both, to raw", "sent", "frames back"]
    return markdown_table(
        head,
        (
            [
                row["carrier"],
                f"{row['frames']:,} × {row['segment_bytes'] // KIB} KiB",
                f"{row['gbps']:.2f}",
                f"{row['sender_s_per_gb']:.2f}",
                f"{row['reader_s_per_gb']:.2f}",
                f"{row['cpu_to_raw']:.2f}",
                f"{row['sent_share']:.5f}" if row["sent_share"] else "",
                f"{row['frames_back']:.0f}" if row["sent_share"] else "",
            ]
            for row in rows
        ),
        align="llr",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the transport costs beside raw ZeroMQ.")
    parser.add_argument("--rounds", type=int, default=7, help="transfers of each carrier (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a Markdown file to write, too")
    options = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.1f}"
    rows = figures(measure(options.rounds))
    print(table(rows))
    if options.out:
        from node.lab.study.trial import host_line  # not in the processes that are measured: it brings torch along

        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"benchmark": "transport cost", "rounds": options.rounds, "rows": rows, "load": load})
        text = PAGE.format(rounds=options.rounds, host=host_line(), load=load, table=table(rows), record=record)
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
