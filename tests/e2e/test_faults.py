"""Processes that die: everyone else ends in time and says who was lost; nothing is left running."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from helpers.isthmus_runs import QUICK, await_end, await_records, children, isthmus, records, started

from node.commands.run import MOST_RESTARTS

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_coordinator_that_is_killed_again_and_again_ends_all(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *LONG, "--run.outputs", tmp_path) as process:
        for _ in range(1 + MOST_RESTARTS):
            await_records(run, len(records(run)) + 3, process)
            children(process)["coordinator"].kill()
        assert await_end(process, DEADLINE_S + 10.0) == 1
    assert f"coordinator-{1 + MOST_RESTARTS} ended with signal SIGKILL" in (tmp_path / "log").read_text()


@pytest.mark.timeout(300)
def test_a_coordinator_that_is_killed_is_started_again_and_nothing_is_lost(tmp_path: Path, cache: Path) -> None:
    """At c = 1, in the middle of whatever it was doing; a second one beside it is refused."""
    exact = ["--train.steps", "60", "--train.sync_every", "1", "--train.checkpoint_every", "7"]
    whole = isthmus(cache, "run", TINY, *QUICK, *exact, "--run.outputs", tmp_path / "whole", timeout_s=150)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "hurt" / "tiny"
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *exact, "--run.outputs", tmp_path / "hurt") as process:
        await_records(run, 5, process)
        second = isthmus(cache, "coordinator", run / "config.toml")
        assert second.returncode == 2
        assert "another process is running this run now" in second.stderr
        for _ in range(3):
            await_records(run, len(records(run)) + 3, process)
            children(process)["coordinator"].kill()
        assert await_end(process, 90) == 0, (tmp_path / "log").read_text()
    assert not (run / "coordinator.state").exists()
    before = {record["step"]: record["loss"] for record in records(tmp_path / "whole" / "tiny")}
    after = {record["step"]: record["loss"] for record in records(run)}
    assert len(after) == len(records(run)), "a step was counted twice"
    assert len(after) >= 60 - 3  # the line of a step may be lost with the coordinator that was about to write it
    assert all(loss == pytest.approx(before[step], rel=1e-4) for step, loss in after.items())
    assert "going on after step" in (run / "logs" / "coordinator-2.log").read_text()
