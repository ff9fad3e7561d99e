"""One process at a time writes to a run's folder; a process that is killed frees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.records.lock import SERVING, check_unlocked, locked
from netem.errors import ConfigError

HOLDER = """
import sys, pathlib
from coordinator.records.lock import SERVING, locked
with locked(pathlib.Path(sys.argv[1]), SERVING):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    with locked(tmp_path, SERVING):
        with pytest.raises(ConfigError, match=f"{tmp_path}: another process is running this run now"):
            check_unlocked(tmp_path)
        check_unlocked(tmp_path / "another")
    check_unlocked(tmp_path)
    assert not (tmp_path / "another").exists()


def test_a_killed_holder_frees_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"):
            check_unlocked(tmp_path)
        holder.kill()
        holder.wait(timeout=30)
    check_unlocked(tmp_path)
