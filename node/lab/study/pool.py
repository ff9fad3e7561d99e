"""Runs the runs: a process each, as many at once as there are cores, and none that has been run before.

A child gets a job file, writes its log beside it and its result under the run's digest. The first failure ends the
others, and so do Ctrl-C and the end of this process (`netem.children`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from netem.children import USER_ERROR, Child, Children
from netem.errors import ConfigError, RunAborted
from node.config import to_tree
from node.lab.study.runs import Run, read_result, weights_path, with_trunks
from node.lab.study.version import code_version

log = logging.getLogger("isthmus.study")

POLL_S = 0.2
RUN_TIMEOUT_S = 6 * 3600.0
CHILD = (sys.executable, "-m", "node.lab.study.trial")


class _Trial(NamedTuple):
    run: Run
    child: Child
    began_s: float


def run_all(runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Run what has no result yet. Raises `ConfigError` or `RunAborted` with the words of the run that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = missing(runs, folder)
    log.info("%d runs, %d of them still to do, %d at once", len(with_trunks(runs)), len(waiting), jobs)
    total, running = len(waiting), list[_Trial]()
    with Children() as children:
        while waiting or running:
            while len(running) < jobs and (run := _next(waiting, [trial.run for trial in running])):
                waiting.remove(run)
                running.append(_start(children, run, folder))
            time.sleep(POLL_S)
            for trial in [trial for trial in running if _ended(trial)]:
                running.remove(trial)
                _close(trial, folder, f"{total - len(waiting) - len(running)} of {total}")


def missing(runs: Sequence[Run], folder: Path) -> list[Run]:
    """What is still to do, in order: a trunk too where an arm waits for its weights."""
    arms = [run for run in runs if read_result(folder, run) is None]
    return [run for run in with_trunks(arms) if read_result(folder, run) is None or _lost(folder, run)]


def _lost(folder: Path, run: Run) -> bool:
    return run.keeps_weights and not weights_path(folder, run).is_file()


def _next(waiting: Sequence[Run], running: Sequence[Run]) -> Run | None:
    """The first that waits for nothing."""
    undone = {run.digest for run in (*waiting, *running)}
    return next((run for run in waiting if run.trunk is None or run.trunk.digest not in undone), None)


def _start(children: Children, run: Run, folder: Path) -> _Trial:
    job_path, log_path = folder / f"{run.digest}.job", folder / f"{run.digest}.log"
    job = {
        "digest": run.digest,
        "code": code_version(),
        "config": to_tree(run.config),
        "trunk": run.trunk.digest if run.trunk else "",
        "weights": str(weights_path(folder, run.trunk)) if run.trunk else "",
        "trunk_steps": run.trunk.config.train.steps if run.trunk else 0,
        "noise": run.noise,
        "keep": str(weights_path(folder, run)) if run.keeps_weights else "",
    }
    job_path.write_text(json.dumps(job))
    log_path.unlink(missing_ok=True)
    command = [*CHILD, str(job_path), str(folder / f"{run.digest}.json")]
    # One thread each, and none that spins while it waits: the cores are shared among runs.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    child = children.start(run.label, command, log_path=log_path, environment=environment)
    return _Trial(run, child, time.monotonic())


def _ended(trial: _Trial) -> bool:
    if not trial.child.running:
        return True
    if time.monotonic() - trial.began_s > RUN_TIMEOUT_S:
        raise RunAborted(
            f"{trial.run.label}: not done after {RUN_TIMEOUT_S / 3600:g} h; its log is {trial.child.log_path}"
        )
    return False


def _close(trial: _Trial, folder: Path, count: str) -> None:
    """Report what became of a trial that has ended. Raises where it failed."""
    run, child = trial.run, trial.child
    result = read_result(folder, run)
    if child.code == 0 and result is not None:
        for leftover in ("log", "job"):
            (folder / f"{run.digest}.{leftover}").unlink(missing_ok=True)
        took_s = time.monotonic() - trial.began_s
        log.info("%s: %s: held-out loss %.4f, %.0f s", count, run.label, result["heldout_loss"], took_s)
        return
    reason = child.reason() or child.describe()
    if child.code == USER_ERROR:
        raise ConfigError(f"{run.label}: {reason}")
    raise RunAborted(f"{run.label}: {reason} (log: {child.log_path})")
