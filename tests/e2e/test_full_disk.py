"""The disk of a run's folder is full for a while, on a real file system: training goes on, and no record is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.isthmus_runs import QUICK, await_end, await_records, children, faults, records, started


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for a run's first records."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "isthmus-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_goes_on_and_the_records_follow(tmp_path: Path, cache: Path, small_disk: Path) -> None:
    run = small_disk / "tiny"
    arguments = ["run", "configs/tiny.toml", *QUICK, "--train.steps", "5000", "--run.outputs", small_disk]
    arguments += ["--train.sync_every", "1", "--train.eval_every", "0"]
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(run, 3, process, 240.0)
        fill(small_disk / "ballast")
        before = len(records(run))
        cpu_s = children(process)["node-0"].cpu_times().user
        time.sleep(6.0)
        assert len(records(run)) <= before + 1, "the disk was not full"
        assert children(process)["node-0"].cpu_times().user > cpu_s, "training goes on"
        (small_disk / "ballast").unlink()
        await_records(run, before + 5, process, 30.0)
        assert [fault["kind"] for fault in faults(run)] == ["disk"]
        assert faults(run)[0]["nodes"] == ["coordinator"]
        process.send_signal(signal.SIGINT)
        await_end(process, 30.0)
        steps = [record["step"] for record in records(run)]
        assert steps == list(range(1, len(steps) + 1)), "no record is missing"
        assert {record["generation"] for record in records(run)} == {records(run)[0]["generation"]}, "nobody was lost"
        # The log itself is on that disk, and what was said meanwhile is lost.
        assert "the coordinator's disk has room again" in (run / "logs" / "coordinator.log").read_text()
