"""Which run may be gone on with, and that a mistake leaves it as it was."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from coordinator.records.folder import (
    CONFIG,
    METRICS,
    checkpoint_folder,
    is_complete,
    latest_complete,
    mark_complete,
)
from coordinator.records.lock import SERVING, STARTING, locked
from netem.errors import ConfigError
from node.commands.run import prepared
from node.config import Config, load_config, save_config
from node.train.resume import log_changes, set_refused_aside, start_step
from node.train.tensor_files import write_tensors


def config(folder: Path, *overrides: str) -> Config:
    return load_config(None, ["--run.outputs", str(folder), "--run.name", "a", "--coordinator.nodes=2", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 300 steps whose last complete checkpoint is after step 40."""
    folder = tmp_path / "a"
    for step in (20, 40):
        mark_complete(folder, step, nodes=2)
    checkpoint_folder(folder, 60).mkdir()  # not complete
    (folder / METRICS).write_text("")
    save_config(config(tmp_path), folder / CONFIG)
    return folder


def resumed(run: Path, *overrides: str) -> Config:
    return config(run.parent, "--run.resume=true", *overrides)


def test_goes_on_from_the_last_complete_checkpoint(run: Path) -> None:
    assert start_step(resumed(run)) == 40
    assert start_step(resumed(run, "--train.steps=500", "--net.profile=unshaped", "--run.threads=3")) == 40


def test_a_run_whose_coordinator_others_can_reach_goes_on_though_the_file_has_no_token(run: Path) -> None:
    asked = resumed(run, "--coordinator.address=tcp://10.0.0.5:7070", "--coordinator.token=secret")
    save_config(asked, run / CONFIG)
    assert start_step(asked) == 40


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--train.batch=4", "train.batch = 4: the run to go on with has 1"),
        ("--run.seed=7", "run.seed = 7: the run to go on with has 0"),
        ("--model.layers=3", "model.layers = 3: the run to go on with has 4"),
        ("--train.steps=40", "raise train.steps"),
        ("--run.name=b", "holds no complete checkpoint"),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(run: Path, override: str, expected: str) -> None:
    before = (run / CONFIG).read_bytes()
    asked = resumed(run, override, *(["--compress.warmup_steps=10"] if "steps=40" in override else []))
    if "steps=40" in override:
        save_config(config(run.parent, "--compress.warmup_steps=10"), run / CONFIG)
        before = (run / CONFIG).read_bytes()
    with pytest.raises(ConfigError, match=expected), prepared(asked):
        pass
    assert (run / CONFIG).read_bytes() == before


def test_a_new_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        with prepared(config(tmp_path)) as claimed:
            names.append(claimed.run.name)
    assert names == ["a", "a-2", "a-3"]


def test_a_failed_start_leaves_no_folder_and_a_resumed_run_keeps_its_own(run: Path, tmp_path: Path) -> None:
    for asked in (config(tmp_path), resumed(run)):
        claimed = ExitStack()
        claimed.enter_context(prepared(asked))
        assert (tmp_path / "a-2").is_dir() == (not asked.run.resume)
        with pytest.raises(ConfigError, match="no such profile"), claimed:
            raise ConfigError("no such profile")
        assert not (tmp_path / "a-2").exists()
    assert is_complete(checkpoint_folder(run, 40))


@pytest.mark.parametrize("name", [SERVING, STARTING])
def test_a_run_that_goes_on_is_not_resumed_a_second_time(run: Path, name: str) -> None:
    before = (run / CONFIG).read_bytes()
    with locked(run, name):
        refused = pytest.raises(ConfigError, match="another process is running this run now")
        with refused, prepared(resumed(run, "--train.steps=500")):
            pass
    assert (run / CONFIG).read_bytes() == before
    with prepared(resumed(run)):  # and again once it is free
        pass


def test_what_may_change_and_does_is_in_the_log(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with prepared(resumed(run, "--train.lr=0.0001", "--run.threads=1", "--compress.unplug_step=200")):
        pass
    assert sorted(caplog.messages) == [
        "compress.unplug_step = 200 from here on; it was 0 before",
        "train.lr = 0.0001 from here on; it was 0.0003 before",
    ]


@pytest.mark.parametrize(
    "override",
    ["--train.lr_warmup_steps=3", "--train.lr_final_share=0.5", "--compress.unplug_step=39"],
)
def test_what_would_change_the_steps_done_may_not(run: Path, override: str) -> None:
    """A key that begins like one that may change is another key; an unplugging that lies behind would be too late."""
    save_config(config(run.parent, "--compress.warmup_steps=20"), run / CONFIG)
    with pytest.raises(ConfigError, match="give it as it was"):
        start_step(resumed(run, override, "--compress.warmup_steps=20"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "COMPLETE.json: damaged"),
        (b"\xff\x00", "COMPLETE.json: damaged"),
        (b"[1, 2]", "COMPLETE.json: damaged"),
        (b'{"step": "40", "nodes": 2}', "COMPLETE.json: damaged"),
        (b'{"step": 40}', "COMPLETE.json: damaged"),
        (b"[" * 100_000, "COMPLETE.json: damaged"),
        (b'{"step": 30, "nodes": 2}', "is of step 30, and the folder's name says otherwise; rename .* to step-000030"),
    ],
)
def test_a_mark_that_is_damaged_or_of_another_step_is_refused(
    run: Path, content: bytes, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint_folder(run, 40) / "COMPLETE.json").write_bytes(content)
    assert start_step(resumed(run)) == 20
    log_changes(resumed(run))
    assert re.search(rf"{expected}.*; the run goes on from .*step-000020", caplog.text)
    (checkpoint_folder(run, 20) / "COMPLETE.json").unlink()
    with pytest.raises(ConfigError, match=f"{expected}.*; no checkpoint before it can be gone on from"):
        start_step(resumed(run))


def test_a_damaged_file_is_refused_by_name_and_the_checkpoint_before_is_used(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On the machine that has it. The damaged one is kept under a name that does not count."""
    for step in (20, 40):
        for name in ("model", "node-0", "node-1"):
            path = checkpoint_folder(run, step) / f"{name}.safetensors"
            write_tensors({"weight": torch.ones(300)}, path, {"step": str(step)})
    assert start_step(resumed(run)) == 40
    path = checkpoint_folder(run, 40) / "node-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    assert start_step(resumed(run)) == 20
    set_refused_aside(resumed(run))
    assert "step-000040 is kept as step-000040.refused" in caplog.text
    assert latest_complete(run) == checkpoint_folder(run, 20)
    mark_complete(run, 40, nodes=2)
    (checkpoint_folder(run, 40) / "COMPLETE.json").write_bytes(b"")
    set_refused_aside(resumed(run))
    assert (run / "checkpoint" / "step-000040.refused2").is_dir()
    assert start_step(resumed(run)) == 20


def test_another_number_of_nodes_goes_on_and_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked = resumed(run, "--coordinator.nodes=3")
    assert start_step(asked) == 40
    log_changes(asked)
    assert "3 nodes go on from the weights that 2 nodes had agreed on; a node that is new takes" in caplog.text


def test_metrics_that_are_none_are_refused_before_anything_starts(run: Path) -> None:
    (run / METRICS).write_bytes(b"\x00\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1: not UTF-8 text"):
        start_step(resumed(run))


def test_a_coordinator_by_hand_does_not_write_over_a_run(run: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        start_step(config(run.parent))
