"""Whole runs, as a newcomer starts them: what they write, and that N nodes and a resumed run lose nothing."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import ROOT
from helpers.isthmus_runs import (
    QUICK,
    await_end,
    await_records,
    command,
    environment,
    isthmus,
    records,
    started,
)
from helpers.small import largest_difference
from safetensors.torch import load_file

TINY = "configs/tiny.toml"
SAVES = ["--train.checkpoint_every", "3"]


class Whole(NamedTuple):
    """A run of six steps that nothing disturbed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Whole:
    outputs = tmp_path_factory.mktemp("whole")
    done = isthmus(cache, "run", TINY, *QUICK, *SAVES, "--run.outputs", outputs)
    assert done.returncode == 0, done.stdout + done.stderr
    return Whole(outputs / "tiny", done.stdout)


def test_a_run_writes_what_it_promises(whole: Whole, cache: Path) -> None:
    run = whole.folder
    assert str(run) in whole.printed
    assert "held-out" in whole.printed
    assert [record["step"] for record in records(run)] == list(range(1, 7))
    assert tomllib.loads((run / "config.toml").read_text())["train"]["steps"] == 6
    assert "token" not in tomllib.loads((run / "config.toml").read_text())["coordinator"]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    checkpoint = run / "checkpoint" / "step-000006"
    assert json.loads((checkpoint / "COMPLETE.json").read_text()) == {"step": 6, "nodes": 2}
    # Both nodes end with the same weights; rank 0's are the run's.
    one, two, agreed = (
        load_file(checkpoint / name) for name in ("node-0.safetensors", "node-1.safetensors", "model.safetensors")
    )
    assert all(torch.equal(agreed[name], one[name]) and torch.equal(agreed[name], two[name]) for name in agreed)
    # The last held-out loss that the nodes measured together is what one node measures on the checkpoint.
    result = isthmus(cache, "eval", run, "--batches", "2")
    assert result.returncode == 0, result.stderr
    measured = json.loads((checkpoint / "evaluation.json").read_text())
    assert measured["step"] == 6
    assert measured["loss"] == pytest.approx(records(run)[-1]["heldout_loss"], rel=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("dense", marks=pytest.mark.slow), "subspace"])
def test_four_processes_equal_one(tmp_path: Path, cache: Path, mode: str) -> None:
    """c = 1: losses of every step, and every gradient of the first: AdamW's first moment is 0.1 × gradient then.

    The second run has the name of the first and does not write over it. Its output's reader goes (`| head -1`), which
    does not end it.
    """
    exact = ["--train.sync_every", "1", "--train.grad_clip", "0", "--train.checkpoint_every", "1"]
    exact += ["--compress.mode", mode, "--compress.warmup_steps", "0", "--compress.basis", "weights"]
    exact += ["--train.steps", "3", "--compress.format", "float32"]
    for nodes, name in (("1", "tiny"), ("4", "tiny-2")):
        words = command("run", TINY, *QUICK, *exact, "--run.outputs", tmp_path, "--coordinator.nodes", nodes)
        with subprocess.Popen(words, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(f"{name} ".encode())
            process.stdout.close()
            assert await_end(process, 90) == 0
    one, four = records(tmp_path / "tiny"), records(tmp_path / "tiny-2")
    assert len(one) == 3
    assert [record["loss"] for record in four] == pytest.approx([record["loss"] for record in one], rel=1e-5)
    moments = []
    for name in ("tiny", "tiny-2"):
        tensors = load_file(tmp_path / name / "checkpoint" / "step-000001" / "node-0.safetensors")
        moments.append({name: tensor for name, tensor in tensors.items() if ".exp_avg." in name})
    assert len(moments[0]) > 20
    difference = largest_difference(moments[1], moments[0])
    print(f"{mode}: largest difference of a gradient between 1 and 4 processes {difference:.1e}")
    assert difference < 1e-5


def test_a_resumed_run_repeats_the_same_losses(tmp_path: Path, cache: Path, whole: Whole) -> None:
    """Also the same run twice gives the same losses, to the last bit."""
    where = ["--run.outputs", tmp_path, *SAVES]
    with started(cache, tmp_path / "log", "run", TINY, *QUICK, *where, "--run.name", "cut") as process:
        await_records(tmp_path / "cut", 4, process)
        process.terminate()
        await_end(process, 30)
    before = len(records(tmp_path / "cut"))
    resumed = isthmus(cache, "run", TINY, *QUICK, *where, "--run.name", "cut", "--run.resume", "true")
    assert resumed.returncode == 0, resumed.stderr
    losses = {record["step"]: record["loss"] for record in records(whole.folder)}
    cut = records(tmp_path / "cut")
    assert [record["step"] for record in cut[before:]] in ([4, 5, 6], [])
    assert all(record["loss"] == losses[record["step"]] for record in cut)
    assert cut[-1]["step"] == 6
