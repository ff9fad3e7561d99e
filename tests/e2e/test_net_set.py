"""The network of a run that goes on, changed by the command that README names, without any token."""

from __future__ import annotations

import signal
import stat
from pathlib import Path

from helpers.isthmus_runs import QUICK, await_end, await_records, isthmus, started

from coordinator.records.secret import SECRET


def test_the_command_finds_the_runs_secret_and_the_end_removes_it(cache: Path, tmp_path: Path) -> None:
    run = ["run", "configs/tiny.toml", *QUICK, "--train.steps", "100000", "--coordinator.nodes", "2"]
    with started(cache, tmp_path / "log", *run, "--run.outputs", tmp_path) as process:
        await_records(tmp_path / "tiny", 1, process)
        assert stat.S_IMODE((tmp_path / "tiny" / SECRET).stat().st_mode) == 0o600
        changed = isthmus(cache, "net", "set", "--coordinator", tmp_path / "tiny", "--rate", "50 Mbit/s")
        assert changed.returncode == 0, changed.stderr
        assert "rate 50 Mbit/s everywhere" in changed.stdout
        process.send_signal(signal.SIGINT)
        await_end(process, 30)
    assert not (tmp_path / "tiny" / SECRET).exists()
