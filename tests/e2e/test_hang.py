"""A node whose trainer stands still while its heartbeats go on: the deadline for progress finds it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from helpers.isthmus_runs import (
    QUICK,
    assert_each_step_counts_once,
    await_end,
    await_fault,
    await_records,
    children,
    faults,
    records,
    started,
)

from node.lab.chaos.hang import GO_ON, HANG, VARIABLE

STEP_TIMEOUT_S, HEARTBEAT_TIMEOUT_S = 5.0, 4.0  # QUICK sets the latter


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trainer_that_hangs_is_found_though_its_heartbeats_go_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    run = tmp_path / "tiny"
    arguments = ["run", "configs/tiny.toml", *QUICK, "--coordinator.nodes", "3", "--train.steps", "500"]
    arguments += ["--train.sync_every", "1", "--train.eval_every", "0", "--run.outputs", str(tmp_path)]
    arguments += ["--coordinator.step_timeout_s", f"{STEP_TIMEOUT_S:g}"]
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(run, 3, process, 240.0)
        hung = children(process)["node-1"]
        hung.send_signal(HANG)
        hung_s = time.time()
        evicted = await_fault(run, "evicted", STEP_TIMEOUT_S + HEARTBEAT_TIMEOUT_S + 20.0)
        assert evicted["nodes"] == ["node-1"]
        assert "silent" not in evicted["reason"], "its heartbeats have gone on"
        print(f"went on {evicted['time'] - hung_s:.1f} s after the trainer stood still")
        await_records(run, len(records(run)) + 2, process)
        assert set(records(run)[-1]["nodes"]) == {"node-0", "node-2"}
        assert [fault["kind"] for fault in faults(run)] == ["evicted"], "it was not lost"
        hung.send_signal(GO_ON)
        joined = await_fault(run, "joined", 60.0)
        assert joined["nodes"] == ["node-1"]
        await_records(run, len(records(run)) + 2, process)
        assert set(records(run)[-1]["nodes"]) == {"node-0", "node-1", "node-2"}
        assert "the others go on without this node: node-1" in (run / "logs" / "node-1.log").read_text()
        process.send_signal(signal.SIGINT)
        await_end(process, 30.0)
    assert_each_step_counts_once(run)
