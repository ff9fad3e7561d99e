"""Which run may be gone on with, and that a mistake leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.records.folder import CONFIG, METRICS, checkpoint_folder, mark_complete
from netem.errors import ConfigError
from node.commands.run import prepare
from node.config import Config, load_config, save_config
from node.train.resume import start_step


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--train.batch=4", "train.batch = 4: the run to go on with has 1"),
        ("--run.seed=7", "run.seed = 7: the run to go on with has 0"),
        ("--model.layers=3", "model.layers = 3: the run to go on with has 4"),
        ("--coordinator.nodes=4", "set coordinator.nodes = 2"),
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
    with pytest.raises(ConfigError, match=expected):
        prepare(asked)
    assert (run / CONFIG).read_bytes() == before


def test_a_new_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = [prepare(config(tmp_path)).run.name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_a_coordinator_by_hand_does_not_write_over_a_run(run: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        start_step(config(run.parent))
