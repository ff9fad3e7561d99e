"""Nodes that die or stop in the middle of a run: the others go on, and lose nothing where gradients are averaged."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.isthmus_runs import (
    QUICK,
    assert_each_step_counts_once,
    await_end,
    await_fault,
    await_records,
    children,
    faults,
    isthmus,
    records,
    started,
)

EXACT = [
    *("--coordinator.nodes", "3", "--train.steps", "14", "--train.sync_every", "1", "--train.eval_every", "0"),
    *("--compress.format", "float32", "--compress.dense_format", "float32"),
]
HEARTBEAT_TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict[str, Any]]:
    """What an undisturbed run of one node records."""
    outputs = tmp_path_factory.mktemp("whole")
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, "--coordinator.nodes", "1", "--run.outputs", outputs]
    undisturbed = isthmus(cache, *arguments, timeout_s=240)
    assert undisturbed.returncode == 0, undisturbed.stderr
    return records(outputs / "tiny")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("relay", ["never", pytest.param("always", marks=pytest.mark.slow)])
def test_kill_of_one_node_of_three_costs_time_and_nothing_else(
    tmp_path: Path, cache: Path, whole: list[dict[str, Any]], relay: str
) -> None:
    """Also where node-1 passes on what node-0 sends to node-2."""
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, "--coordinator.relay", relay]
    with started(cache, tmp_path / "log", *arguments, "--run.outputs", tmp_path / "hurt") as process:
        run = tmp_path / "hurt" / "tiny"
        await_records(run, 4, process, 240.0)
        killed_s = time.time()
        children(process)["node-1"].kill()
        assert await_end(process, 200) == 0, (tmp_path / "log").read_text()
    hurt = records(run)
    assert [record["step"] for record in hurt] == list(range(1, 15)), "each step counts once"
    assert {len(record["nodes"]) for record in hurt} == {2, 3}
    for one, other in zip(whole, hurt, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)
    assert hurt[-1]["heldout_loss"] == pytest.approx(whole[-1]["heldout_loss"], rel=1e-3)
    (fault,) = faults(run)
    assert (fault["kind"], fault["nodes"], fault["lost_steps"]) == ("lost", ["node-1"], 0)
    assert "with 3/1 chunks" in fault["done"]
    goes_on_s = fault["time"] - killed_s
    print(f"went on {goes_on_s:.1f} s after the kill; found after {goes_on_s - fault['cost_s']:.1f} s")
    assert goes_on_s < 2 * HEARTBEAT_TIMEOUT_S + 5.0
    assert "node-1 ended with signal SIGKILL" in (tmp_path / "log").read_text()
    assert "Traceback" not in (run / "logs" / "node-0.log").read_text()


@pytest.mark.timeout(400)
def test_who_stops_is_fenced_and_comes_back_and_so_does_who_is_started_again(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, "--train.steps", "500", "--run.outputs", tmp_path]
    with started(cache, tmp_path / "log", *arguments, token="secret") as process:
        await_records(run, 3, process, 240.0)
        family = children(process)
        family["node-1"].suspend()
        lost = await_fault(run, "lost", HEARTBEAT_TIMEOUT_S + 10.0)
        assert lost["nodes"] == ["node-1"]
        before = len(records(run))
        await_records(run, before + 2, process)
        assert set(records(run)[-1]["nodes"]) == {"node-0", "node-2"}
        family["node-1"].resume()
        joined = await_fault(run, "joined", 30.0)
        assert joined["nodes"] == ["node-1"]
        await_records(run, len(records(run)) + 2, process)
        assert set(records(run)[-1]["nodes"]) == {"node-0", "node-1", "node-2"}
        told = (run / "logs" / "node-1.log").read_text()
        assert "the others go on without this node: node-1" in told
        assert "silent for 4 s" in told
        # One that was killed is started again by hand.
        family["node-2"].kill()
        address = (run / "coordinator.address").read_text().strip()
        again = ["node", run / "config.toml", "--join", address, "--name", "node-2"]
        with started(cache, tmp_path / "again.log", *again, token="secret"):
            deadline = time.monotonic() + 60.0
            while [fault["nodes"] for fault in faults(run) if fault["kind"] == "joined"] != [["node-1"], ["node-2"]]:
                assert time.monotonic() < deadline, (tmp_path / "again.log").read_text()
                time.sleep(0.1)
            await_records(run, len(records(run)) + 2, process)
            assert set(records(run)[-1]["nodes"]) == {"node-0", "node-1", "node-2"}
            process.send_signal(signal.SIGINT)
            await_end(process, 30.0)
    assert_each_step_counts_once(run)
