"""The kept key of a run: readable by its owner only, and gone with the run."""

import os
import stat
from pathlib import Path

import pytest

from coordinator.records.secret import SECRET, drop_secret, keep_secret, secret_path


def test_a_secret_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keep_secret(tmp_path, "tok")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / SECRET).stat().st_mode) == 0o600
    assert (tmp_path / SECRET).read_text() == "tok"


def test_a_later_run_replaces_it_and_the_end_removes_it(tmp_path: Path) -> None:
    keep_secret(tmp_path, "old")
    keep_secret(tmp_path, "new")
    assert (tmp_path / SECRET).read_text() == "new"
    drop_secret(tmp_path)
    drop_secret(tmp_path)
    assert secret_path(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_lies_there_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / SECRET).symlink_to(elsewhere)
    keep_secret(tmp_path, "tok")
    assert elsewhere.read_text() == "mine"
    assert (tmp_path / SECRET).read_text() == "tok"


def test_where_it_cannot_be_private_it_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.fstat

    def shared(descriptor: int) -> os.stat_result:
        """As on a file system without modes, where all files are everybody's."""
        found = list(honest(descriptor))
        found[0] |= 0o077
        return os.stat_result(found)

    monkeypatch.setattr("coordinator.records.secret.os.fstat", shared)
    keep_secret(tmp_path, "tok")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
