"""Evidence: live changes and a partition during a training run. Rates follow, training goes on, nothing is lost.

    python tests/benchmarks/live_change.py [--steps N] [--out docs/netem/live.md]

1. **Rates follow.** Two nodes without a model, and a coordinator; one sends to the other as fast as it may while rates
   are changed as `isthmus net set` does it, and the receiver's bytes are read every 5 ms. Of each change: after how
   long, since it reached the receiver, a window's rate is within 5 % of the new one, to 10 ms. A window is 50 ms, or
   as long as 25 segments take where that is more. A first window may be luck: beside it stands by how much the rate is
   off over the whole second that begins 100 ms after the change.
2. **Training goes on, nothing is lost.** One config twice, each as `isthmus run` does it: left alone; and with its rate
   changed, then all nodes cut off from each other, healed, and reset by `isthmus net` while it trains. Every loss of
   every step must be equal to the last bit: a payload lost, doubled, damaged or out of order would show.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from helpers import ROOT

from coordinator.client import Session, sender
from coordinator.config import CoordinatorConfig
from coordinator.keyring import OperatorKeys, node_access, operator_pair
from coordinator.messages import COORDINATOR, RUN_ID, control_buffer
from coordinator.operator import ask
from coordinator.plan import RunPlan
from coordinator.server import CoordinatorServer
from netem.changes import Tune
from netem.endpoint import Endpoint, unique
from netem.errors import IsthmusError
from netem.keys import derived_pair
from netem.limits import Limits
from netem.network import Profile
from netem.schedule import Schedule, Timed
from netem.units import format_rate
from node.config import TOKEN_VARIABLE
from node.lab.study.trial import host_line

RATES_BPS = (300e6, 50e6, 300e6, 20e6, 100e6, 300e6)
SEGMENT_BYTES = 32_768
HOME = Profile(name="home", rate_bps=RATES_BPS[0], latency_s=0.025, segment_size_bytes=SEGMENT_BYTES)
SAMPLE_S, STEP_S, WINDOW_S, WINDOW_SEGMENTS, WATCHED_S = 0.005, 0.01, 0.05, 25, 1.0
WITHIN, TARGET_S = 0.05, 0.1
PAYLOAD = bytes(500_000)
CUT_S = 3.0
PATIENCE_S = 600.0

PAGE = """\
# Live changes and a partition during a training run

Written by `python tests/benchmarks/live_change.py --steps {steps}`, whose head says what is measured; {host}.

## Rates follow

| change | first window within {within:.0%} after | off over the second from {target_ms:.0f} ms on |
|---|---|---|
{rates}

The slowest took {slowest_ms:.0f} ms; the target is {target_ms:.0f} ms.

## Training goes on, nothing is lost

`configs/tiny.toml`, {steps} steps on two nodes, left alone, and with these changes by command:

| in step | change |
|---|---|
{changes}

| | left alone | changed |
|---|---|---|
| exit code | {codes[0]} | {codes[1]} |
| steps done | {counts[0]} | {counts[1]} |
| last loss | {losses[0]!r} | {losses[1]!r} |
| steps with a loss equal to the last bit | | {equal} of {steps} |
| bytes sent again | {resent[0]:.0f} | {resent[1]:.0f} |
| longest step | {longest_s[0]:.2f} s | {longest_s[1]:.2f} s, with a cut of {cut_s:g} s |
"""


class Follow(NamedTuple):
    """One change: rates before and after, the time until the first window with the new one (None: not seen), and by
    what share the rate is off over `WATCHED_S` from `TARGET_S` on."""

    before_bps: float
    after_bps: float
    took_s: float | None
    off: float


BIND = "tcp://127.0.0.1:0"


class Node:
    """An endpoint with a session, and nothing to compute."""

    def __init__(self, name: str, address: str, config: CoordinatorConfig) -> None:
        access, lead = node_access(config, BIND)
        self.peer = unique(name, access.pair.public)
        self.began = 0.0
        self.changes: tuple[Timed, ...] = ()
        limits = Limits(max_strangers=0)
        self.endpoint = Endpoint(self.peer, RUN_ID, HOME, self, bind=BIND, limits=limits, access=access)
        self.endpoint.connect(COORDINATOR, address, answers_only=True, key=lead)
        self.session = Session(
            config,
            sender(self.endpoint),
            run="live",
            name=name,
            address=self.endpoint.address,
            config_digest="",
            access=access,
            on_network=self._follow,
        )

    def close(self) -> None:
        self.session.leave()
        self.endpoint.close()

    def _follow(self, heard: float, changes: tuple[Timed, ...]) -> None:
        self.began, self.changes = heard - HOME.latency_s, changes
        self.endpoint.follow(Schedule(HOME).with_timed(changes), self.began)

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return control_buffer(tag, total_bytes, peer) if peer == COORDINATOR else memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        if peer == COORDINATOR:
            self.session.on_message(buffer)

    def failed(self, error: IsthmusError) -> None:
        self.session.on_failure(error)


class Sampler:
    """How much an endpoint has received from a peer, read every `SAMPLE_S` while it is entered."""

    def __init__(self, endpoint: Endpoint, peer: str) -> None:
        self._endpoint, self._peer = endpoint, peer
        self._samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(5.0)

    def bps(self, begin: float, end: float) -> float:
        """The mean rate between the samples nearest to two moments."""
        first, last = (min(self._samples, key=lambda one: abs(one[0] - at)) for at in (begin, end))
        return 8 * (last[1] - first[1]) / max(last[0] - first[0], 1e-9)

    def settled_s(self, since: float, rate_bps: float) -> float | None:
        """How long after `since` the first window with `rate_bps` begins; None if that is not seen."""
        window_s = max(WINDOW_S, WINDOW_SEGMENTS * SEGMENT_BYTES * 8 / rate_bps)
        for step in range(round(WATCHED_S / STEP_S)):
            begin = since + step * STEP_S
            if abs(self.bps(begin, begin + window_s) / rate_bps - 1) <= WITHIN:
                return step * STEP_S
        return None

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._samples.append((time.monotonic(), self._endpoint.counters()[self._peer].received_wire_bytes))


def rates_follow() -> list[Follow]:
    """What each change of `RATES_BPS` to the next one looks like at the receiver."""
    config = CoordinatorConfig(nodes=2, token=secrets.token_hex(8), operator=secrets.token_hex(8))
    keys = OperatorKeys(
        coordinator=derived_pair(config.token, COORDINATOR).public, secret=operator_pair(config.operator).secret
    )
    plan = RunPlan(
        run_name="live",
        chunks=2,
        steps=1,
        batch=1,
        config_digest="",
        rounds_for=lambda step: [],
        schedule=Schedule(HOME),
    )
    server = CoordinatorServer(config, plan, record=lambda record: None, checkpoint_complete=lambda step, nodes: None)
    with ThreadPoolExecutor(3) as pool, ExitStack() as stack:
        pool.submit(server.serve)
        stack.callback(server.stop, "measured")
        a, b = (Node(f"node-{rank}", server.address, config) for rank in range(2))
        for node in (a, b):
            stack.callback(node.close)
        rosters = pool.map(lambda node: node.session.join()[1], (a, b))
        for node, other, roster in zip((a, b), (b, a), rosters, strict=True):
            node.endpoint.share(roster.secret)
            (entry,) = (entry for entry in roster.members if entry.peer == other.peer)
            node.endpoint.connect(entry.peer, entry.address, key=entry.key, encrypted=entry.encrypted)
        for _ in range(2000):  # more than the rates let through meanwhile; the bytes are there only once
            a.endpoint.send(b.peer, b"bulk", [PAYLOAD])
        time.sleep(1.0)
        with Sampler(b.endpoint, a.peer) as sampler:
            return [_change(a, sampler, server.address, keys, *ends) for ends in itertools.pairwise(RATES_BPS)]


def _change(
    node: Node, sampler: Sampler, address: str, keys: OperatorKeys, before_bps: float, after_bps: float
) -> Follow:
    ask(address, keys, Tune(has_rate=True, rate_bps=after_bps))
    reached = node.began + node.changes[-1].at_s + HOME.latency_s  # what left before arrives at the rate there was
    time.sleep(max(0.0, reached + 2 * WATCHED_S - time.monotonic()))
    begin = reached + TARGET_S
    return Follow(
        before_bps,
        after_bps,
        sampler.settled_s(reached, after_bps),
        sampler.bps(begin, begin + WATCHED_S) / after_bps - 1,
    )


def train(folder: Path, name: str, steps: int, *, changed: bool) -> int:
    """One run to its end; its exit code."""
    settings = ["--train.steps", str(steps), "--compress.warmup_steps", "4", "--run.outputs", str(folder)]
    environment = os.environ | {TOKEN_VARIABLE: secrets.token_hex(8)}
    command = [sys.executable, "-m", "node.cli"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "run", "configs/tiny.toml", *settings, "--run.name", name],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            for at, *arguments in _CHANGES if changed else ():
                _await_step(folder / name, int(at * steps), process)
                if arguments == ["heal"]:
                    time.sleep(CUT_S)
                where = ["--coordinator", str(folder / name)]
                subprocess.run([*command, "net", *arguments, *where], cwd=ROOT, env=environment, check=True)
            return process.wait(PATIENCE_S)
        finally:
            process.terminate()  # which ends its children too; nothing, where it has ended
            process.wait(30)


_CHANGES = (
    (0.2, "set", "--rate", "20 Mbit/s"),
    (0.4, "cut", "node-0", "node-1"),
    (0.4, "heal"),
    (0.6, "set", "--rate", "1 Gbit/s", "--latency", "5 ms"),
    (0.8, "reset"),
)


def _await_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(_records(run)) < step:
        assert process.poll() is None, f"{run.name} ended with {process.returncode}; see {run.parent}"
        assert time.monotonic() < deadline, f"{run.name}: step {step} took more than {PATIENCE_S:g} s"
        time.sleep(0.05)


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def page(steps: int, changes: Sequence[Follow], codes: tuple[int, int], runs: Sequence[Any]) -> str:
    """All that was measured, as Markdown."""
    took_ms = [float("inf") if one.took_s is None else 1000 * one.took_s for one in changes]
    alone, changed = runs
    equal = sum(one["loss"] == other["loss"] for one, other in zip(alone, changed, strict=False))
    return PAGE.format(
        host=host_line(),
        steps=steps,
        within=WITHIN,
        rates="\n".join(
            f"| {format_rate(one.before_bps)} → {format_rate(one.after_bps)} | {late_ms:.0f} ms | {one.off:+.1%} |"
            for one, late_ms in zip(changes, took_ms, strict=True)
        ),
        slowest_ms=max(took_ms),
        target_ms=1000 * TARGET_S,
        changes="\n".join(
            f"| {record['step']} | {change['change']} |" for record in changed for change in record.get("network", [])
        ),
        codes=codes,
        counts=[len(run) for run in runs],
        losses=[run[-1]["loss"] for run in runs],
        equal=equal,
        resent=[sum(record["resent_bytes"] for record in run) for run in runs],
        longest_s=[max(record["step_s"] for record in run) for run in runs],
        cut_s=CUT_S,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Live changes and a partition during a training run.")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a Markdown file to write, too")
    options = parser.parse_args()
    changes = rates_follow()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = (
            train(folder, "alone", options.steps, changed=False),
            train(folder, "changed", options.steps, changed=True),
        )
        text = page(options.steps, changes, codes, [_records(folder / run) for run in ("alone", "changed")])
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
