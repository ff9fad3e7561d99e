"""Ctrl-C, SIGTERM and `kill -9` of `isthmus run`: all its processes are gone in time, in whatever phase it comes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers.isthmus_runs import QUICK, await_end, children, records, started

pytestmark = pytest.mark.alone

ENDED_S = 5.0
"""From the signal to the end of the last process."""
START_S = 60.0


def has_started(run: Path) -> bool:
    """The nodes' processes are there, and import what they need."""
    return (run / "logs" / "node-1.log").exists()


def joins(run: Path) -> bool:
    """A node is about to ask the coordinator to let it in."""
    return any("corpus" in log.read_text() for log in (run / "logs").glob("node-*.log"))


def trains(run: Path) -> bool:
    return len(records(run)) >= 3


PHASES = {"starting": has_started, "joining": joins, "training": trains}
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
DEFAULT = {("starting", INT), ("joining", TERM), ("joining", KILL), ("training", INT), ("training", KILL)}


def case(phase: str, number: signal.Signals) -> object:
    marks = [] if (phase, number) in DEFAULT else [pytest.mark.slow]
    return pytest.param(phase, number, marks=marks, id=f"{phase}-{number.name}")


@pytest.mark.parametrize(("phase", "number"), [case(phase, number) for phase in PHASES for number in (INT, TERM, KILL)])
def test_the_end_of_the_parent_ends_all(tmp_path: Path, cache: Path, phase: str, number: signal.Signals) -> None:
    run = tmp_path / "tiny"
    long = ["--train.steps", "500", "--train.checkpoint_every", "3", "--run.outputs", tmp_path]
    with started(cache, tmp_path / "log", "run", "configs/tiny.toml", *QUICK, *long) as process:
        deadline = time.monotonic() + START_S
        while not (PHASES[phase](run) and len(children(process)) == 3):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = children(process)
        assert set(family) == {"coordinator", "node-0", "node-1"}
        process.send_signal(number)
        began = time.monotonic()
        assert await_end(process, ENDED_S) == (-KILL if number is KILL else 130)
        _, alive = psutil.wait_procs(family.values(), timeout=ENDED_S)
        took_s = time.monotonic() - began
    print(f"{phase}, {number.name}: all have ended after {took_s:.1f} s")
    assert not alive
    assert took_s < ENDED_S
    for log in (tmp_path / "log", *(run / "logs").iterdir()):
        assert "Traceback" not in log.read_text(), log.read_text()
