"""Checkpoints on a real disk: a damaged one is passed over by name, and another number of nodes goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.isthmus_runs import QUICK, isthmus, records

TINY = "configs/tiny.toml"


def test_another_number_of_nodes_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, cache: Path) -> None:
    """At c = 1 nothing is lost: the losses are those of the run that was not disturbed."""
    arguments = ["run", TINY, *QUICK, "--train.sync_every", "1", "--train.checkpoint_every", "2"]
    arguments += ["--train.keep_last", "2", "--run.outputs", tmp_path, "--run.name", "one"]
    whole = isthmus(cache, *arguments)
    assert whole.returncode == 0, whole.stderr
    folder, before = tmp_path / "one" / "checkpoint", records(tmp_path / "one")
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]
    part = folder / "step-000006" / "node-1.safetensors"
    content = bytearray(part.read_bytes())
    content[-100] ^= 4
    part.write_bytes(content)

    resumed = isthmus(cache, *arguments, "--run.resume", "true", "--coordinator.nodes", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-000006/node-1.safetensors: damaged" in resumed.stderr
    assert "4 nodes go on from the weights that 2 nodes had agreed on" in resumed.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006", "step-000006.refused"]
    after = records(tmp_path / "one")[len(before) :]
    assert [record["step"] for record in after] == [5, 6]
    assert len(after[0]["nodes"]) == 4
    losses = {record["step"]: record["loss"] for record in before}
    assert [record["loss"] for record in after] == pytest.approx([losses[5], losses[6]], rel=1e-4)
    assert isthmus(cache, "eval", tmp_path / "one", "--batches", "1").returncode == 0
