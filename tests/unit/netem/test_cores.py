"""Cores by affinity and control group, and their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netem import cores


def tree(root: Path, group: str, **files: str) -> tuple[Path, Path]:
    """A /proc whose process is in `group`, and a /sys/fs/cgroup with these files ("a/b/cpu.max" as a__b__cpu_max)."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(group)
    for name, text in files.items():
        path = root / "cgroup" / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "cgroup").mkdir(exist_ok=True)
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 1.5),  # a container with cpus: 1.5
        ("0::/\n", {"cpu_max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a__cpu_max": "200000 100000\n", "a__b__cpu_max": "max 100000\n"}, 2.0),  # a limit further up
        ("0::/a/b\n", {"a__cpu_max": "200000 100000\n", "a__b__cpu_max": "50000 100000\n"}, 0.5),
        ("0::/elsewhere\n", {"cpu_max": "300000 100000\n"}, 3.0),  # the path is the host's
        ("4:cpu,cpuacct:/x\n", {"cpu__x__cpu_cfs_quota_us": "400000\n", "cpu__x__cpu_cfs_period_us": "100000\n"}, 4.0),
        ("4:cpu:/\n", {"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu_max": "nonsense"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_limit_of_a_control_group(tmp_path: Path, group: str, files: dict[str, str], limit: float | None) -> None:
    assert cores.time_limit(*tree(tmp_path, group, **files)) == limit


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert cores.time_limit(tmp_path / "proc", tmp_path / "cgroup") is None


def test_cores_are_shared_out_and_none_gets_less_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "time_limit", lambda: None)
    assert [cores.share(processes) for processes in (1, 3, 4, 20)] == [8, 2, 2, 1]
    monkeypatch.setattr(cores, "time_limit", lambda: 2.5)
    assert [cores.share(processes) for processes in (1, 4, 20)] == [2, 2, 1]
    monkeypatch.setattr(cores, "time_limit", lambda: 0.5)
    assert cores.share() == 1


def test_the_name_tells_other_cores_and_other_machines_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    monkeypatch.setattr(cores, "_BOOT_ID", boot)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    mine = cores.name()
    assert cores.name() == mine
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    assert cores.name() != mine
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    boot.write_text("two\n")
    assert cores.name() != mine
    boot.unlink()
    assert cores.name() == cores.name()
