"""A machine that sleeps with all of a run on it: when it wakes, the run goes on as if nothing had been."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers.isthmus_runs import QUICK, await_end, await_records, records, started

ASLEEP_S = 12.0
"""Three times the heartbeat timeout that QUICK sets, and longer than a step may take."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_processes_stop_and_go_on(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    arguments = ["run", "configs/tiny.toml", *QUICK, "--train.steps", "500", "--run.outputs", tmp_path]
    arguments += ["--train.eval_every", "0", "--coordinator.step_timeout_s", "8"]
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(run, 3, process, 240.0)
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everybody:
            one.suspend()
        before = len(records(run))
        time.sleep(ASLEEP_S)
        for one in everybody:
            one.resume()
        await_records(run, before + 10, process, 60.0)
        told = (run / "logs" / "coordinator.log").read_text()
        assert "this coordinator stood still for" in told
        assert not (run / "faults.jsonl").exists(), (run / "faults.jsonl").read_text()
        process.send_signal(signal.SIGINT)
        await_end(process, 30.0)
    assert len({record["generation"] for record in records(run)}) == 1
