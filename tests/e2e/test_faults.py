"""Processes that die: everyone else ends in time and says who was lost; nothing is left running."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers.isthmus_runs import QUICK, await_end, await_records, children, isthmus, records, started

pytestmark = pytest.mark.alone

TINY = "configs/tiny.toml"
LONG = ["--train.steps", "500", "--train.checkpoint_every", "3"]
DEADLINE_S = 4.0 + 10.0  # heartbeat_timeout_s, and time to end


def test_where_a_loss_ends_the_run_kill_of_one_node_ends_all_and_names_it(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    ends = ["--coordinator.max_retries_per_step", "0"]
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *LONG, *ends, "--run.outputs", tmp_path) as process:
        await_records(run, 7, process)
        family = children(process)
        assert set(family) == {"coordinator", "node-0", "node-1"}
        family["node-1"].kill()
        assert await_end(process, DEADLINE_S) == 1
        assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family.values())
    for survivor in ("coordinator", "node-0"):
        assert "node-1" in (run / "logs" / f"{survivor}.log").read_text().splitlines()[-1]
    shown = (tmp_path / "log").read_text()
    assert "node-1 ended with signal SIGKILL" in shown
    assert "Traceback" not in shown
    # The last checkpoint resumes.
    steps = ["--train.steps", "500"]
    done = isthmus(cache, "eval", run, "--batches", "1")
    assert done.returncode == 0, done.stderr
    before = len(records(run))
    arguments = ["run", TINY, *QUICK, *LONG, *steps, "--run.outputs", tmp_path, "--run.resume", "true"]
    with started(cache, tmp_path / "log2", *arguments) as process:
        await_records(run, before + 3, process)
        assert records(run)[before]["step"] % 3 == 1
        process.send_signal(signal.SIGINT)
        await_end(process, DEADLINE_S)


def test_a_namesake_with_the_wrong_token_ends_nothing(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *LONG, "--run.outputs", tmp_path) as process:
        await_records(run, 2, process)
        address = (run / "coordinator.address").read_text().strip()
        join = ["node", run / "config.toml", "--join", address, "--name", "node-1"]
        with started(cache, tmp_path / "namesake.log", *join, token="wrong") as namesake:
            assert await_end(namesake, 30) == 2
        await_records(run, len(records(run)) + 5, process)
        assert len(children(process)) == 3
        process.send_signal(signal.SIGINT)
        await_end(process, DEADLINE_S)
    told = (tmp_path / "namesake.log").read_text().splitlines()[-1]
    assert "refuses this node: it does not accept this node's key; give ISTHMUS_TOKEN" in told
    assert "stopped by SIGTERM" in (run / "logs" / "node-1.log").read_text().splitlines()[-1]


def test_kill_of_the_coordinator_ends_all(tmp_path: Path, cache: Path) -> None:
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *LONG, "--run.outputs", tmp_path) as process:
        await_records(tmp_path / "tiny", 3, process)
        family = children(process)
        family["coordinator"].kill()
        began = time.monotonic()
        assert await_end(process, DEADLINE_S + 10.0) == 1
        assert time.monotonic() - began < DEADLINE_S + 10.0
    assert "coordinator" in (tmp_path / "tiny" / "logs" / "node-0.log").read_text().splitlines()[-1]
