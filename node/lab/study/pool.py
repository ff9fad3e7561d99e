"""Runs the runs: a process each, as many at once as there are cores, and none that has been run before.

A child gets a job file, writes its log beside it and its result under the run's digest. The first failure ends the
others, and so does Ctrl-C; should this process be killed, the children find their standard input closed and end.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from netem.errors import ConfigError, RunAborted
from node.config import to_tree
from node.lab.study.plan import Run, read_result
from node.lab.study.version import code_version

log = logging.getLogger("isthmus.study")

POLL_S = 0.2
RUN_TIMEOUT_S = 6 * 3600.0
USER_ERROR = 2
CHILD = (sys.executable, "-m", "node.lab.study.trial")


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    log_path: Path
    began_s: float


def run_all(runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Run what has no result yet. Raises `ConfigError` or `RunAborted` with the words of the run that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list({run.digest: run for run in reversed(runs) if read_result(folder, run) is None}.values())[::-1]
    log.info("%d runs, %d of them still to do, %d at once", len(runs), len(waiting), jobs)
    total, running = len(waiting), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), folder))
            time.sleep(POLL_S)
            for child in [child for child in running if _ended(child)]:
                running.remove(child)
                _close(child, folder, f"{total - len(waiting) - len(running)} of {total}")
    finally:
        _end(running)


def _start(run: Run, folder: Path) -> _Child:
    job_path, log_path = folder / f"{run.digest}.job", folder / f"{run.digest}.log"
    job = {"digest": run.digest, "code": code_version(), "config": to_tree(run.config)}
    job_path.write_text(json.dumps(job))
    command = [*CHILD, str(job_path), str(folder / f"{run.digest}.json")]
    # One thread each, and none that spins while it waits: the cores are shared among runs.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log_path.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return _Child(run, process, log_path, time.monotonic())


def _ended(child: _Child) -> bool:
    if child.process.poll() is not None:
        return True
    if time.monotonic() - child.began_s > RUN_TIMEOUT_S:
        raise RunAborted(f"{child.run.label}: not done after {RUN_TIMEOUT_S / 3600:g} h; its log is {child.log_path}")
    return False


def _close(child: _Child, folder: Path, count: str) -> None:
    """Say what became of a child that has ended. Raises where it failed."""
    _end([child])
    result = read_result(folder, child.run)
    if child.process.returncode == 0 and result is not None:
        for leftover in (child.log_path, child.log_path.with_suffix(".job")):
            leftover.unlink(missing_ok=True)
        took_s = time.monotonic() - child.began_s
        log.info("%s: %s: held-out loss %.4f, %.0f s", count, child.run.label, result["heldout_loss"], took_s)
        return
    lines = child.log_path.read_text(errors="replace").splitlines() or ["said nothing"]
    if child.process.returncode == USER_ERROR:
        raise ConfigError(f"{child.run.label}: {lines[-1].removeprefix('error: ')}")
    raise RunAborted(f"{child.run.label}: {lines[-1].removeprefix('error: ')} (log: {child.log_path})")


def _end(children: Sequence[_Child]) -> None:
    """Leave no process behind."""
    stops: tuple[Callable[[subprocess.Popen[bytes]], None], ...] = (subprocess.Popen.terminate, subprocess.Popen.kill)
    for stop in stops:
        for child in children:
            if child.process.poll() is None:
                stop(child.process)
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(5.0)
    for child in children:
        if child.process.stdin:
            child.process.stdin.close()
