"""A node that gets a fifth of the time is named with a figure, and gets fewer chunks where the user wants that."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
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

PERIOD_S, SHARE = 0.25, 0.2


@contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    """The process runs for a share of the time."""
    over = threading.Event()

    def alternate() -> None:
        while not over.is_set():
            process.suspend()
            time.sleep((1 - SHARE) * PERIOD_S)
            process.resume()
            time.sleep(SHARE * PERIOD_S)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slow_node_is_named_and_gets_fewer_chunks(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "tiny"
    arguments = ["run", "configs/tiny.toml", *QUICK, "--coordinator.nodes", "2", "--train.steps", "5000"]
    arguments += ["--train.sync_every", "1", "--train.eval_every", "0", "--run.outputs", str(tmp_path)]
    arguments += ["--coordinator.slow", "unload", "--coordinator.slow_steps", "10", "--run.threads", "1"]
    arguments += ["--coordinator.slow_factor", "1.8"]
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(run, 12, process, 240.0)
        before = len(faults(run)) if (run / "faults.jsonl").exists() else 0
        assert before == 0, "nodes of one machine are about equally fast"
        with slowed(children(process)["node-1"]):
            slow = await_fault(run, "slow", 120.0)
            assert slow["nodes"] == ["node-1"]
            assert "times slower than the median of the others over 10 steps" in slow["reason"]
            assert slow["done"].endswith("with 3/1 chunks")
            await_records(run, len(records(run)) + 3, process)
        print(slow["reason"])
        process.send_signal(signal.SIGINT)
        await_end(process, 30.0)
    assert_each_step_counts_once(run)
