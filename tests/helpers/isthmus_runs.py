"""`isthmus` as a user starts it: real processes on 127.0.0.1, each wait with a time limit, nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from helpers import ROOT

QUICK = [
    *("--train.steps", "6", "--compress.warmup_steps", "2", "--train.eval_batches", "2", "--train.sync_every", "3"),
    *("--compress.calibration_batches", "1", "--model.context", "64", "--net.latency", "1 ms"),
    *("--coordinator.heartbeat_timeout_s", "4", "--coordinator.heartbeat_interval_s", "0.5"),
    *("--data.max_tokens", "40000"),  # the evaluation at the end takes all held-out tokens, up to 65536
]


def free_port() -> int:
    """A port of this machine at which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "node.cli", *map(str, arguments)]


def environment(cache: Path, token: str | None = None) -> dict[str, str]:
    """Without colours or a token of the machine's own; with the tests' corpus cache."""
    kept = {key: value for key, value in os.environ.items() if key not in ("ISTHMUS_TOKEN", "ISTHMUS_OPERATOR")}
    return kept | {"ISTHMUS_CACHE": str(cache), "COLUMNS": "120"} | ({"ISTHMUS_TOKEN": token} if token else {})


def isthmus(cache: Path, *arguments: str | Path, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=timeout_s
    )


@contextmanager
def started(
    cache: Path, log: Path, *arguments: str | Path, token: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command under way, in a session of its own; it and its children are gone afterwards."""
    with under_way(command(*arguments), ROOT, environment(cache, token), log) as process:
        yield process


@contextmanager
def under_way(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The same for any command, in a folder and an environment."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = {}
    try:
        yield process
        family = _family(process.pid)
    finally:
        for member in (_family(process.pid) | family).values():
            if member.is_running():
                member.kill()
        process.wait(10)


def _family(pid: int) -> dict[int, psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return {member.pid: member for member in [*parent.children(recursive=True), parent]}
    except psutil.NoSuchProcess:
        return {}


def records(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def await_records(run_folder: Path, count: int, process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    """Wait until a run has recorded `count` steps."""
    deadline = time.monotonic() + timeout_s
    while len(records(run_folder)) < count:
        assert process.poll() is None, f"ended with {process.returncode} after {len(records(run_folder))} steps"
        assert time.monotonic() < deadline, f"{len(records(run_folder))} of {count} steps in {timeout_s} s"
        time.sleep(0.02)


def faults(run: Path) -> list[dict[str, Any]]:
    """The faults that a run has told."""
    return [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]


def await_fault(run: Path, kind: str, timeout_s: float) -> dict[str, Any]:
    """Wait until a fault of this kind has been told."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = [fault for fault in faults(run) if fault["kind"] == kind] if (run / "faults.jsonl").exists() else []
        if found:
            return found[0]
        assert time.monotonic() < deadline, f"no node {kind} within {timeout_s} s"
        time.sleep(0.05)


def assert_each_step_counts_once(run: Path) -> None:
    """No step is missing from a run's records or there twice, and no log has a traceback."""
    steps = [record["step"] for record in records(run)]
    assert steps == list(range(1, len(steps) + 1)), "each step counts once"
    for log in (run / "logs").iterdir():
        assert "Traceback" not in log.read_text(), log.read_text()


def await_end(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """The exit code of a process that must end by itself in time."""
    return process.wait(timeout_s)


def children(process: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The swarm's processes by name: coordinator, node-0, …"""
    found = {}
    for child in psutil.Process(process.pid).children():
        line = child.cmdline()
        if "coordinator" in line:
            found["coordinator"] = child
        elif "--rank" in line:  # one that has only been forked still has its parent's command line
            found[f"node-{line[line.index('--rank') + 1]}"] = child
    return found
