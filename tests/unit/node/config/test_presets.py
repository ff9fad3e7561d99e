"""Presets: each loads, states what its purpose depends on, lies between the defaults and the file, and trains."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.coordinated import train
from helpers.worlds import WORLDS

from netem.config import describe, flat
from netem.errors import ConfigError
from netem.profile import resolve
from node.config import Config, load_config, save_config, to_tree
from node.config.presets import load_preset, preset_names
from node.train.from_config import payload_format

TINY = ROOT / "configs" / "tiny.toml"
NAMES = ("datacenter", "exact", "home", "paper")


def test_these_are_the_presets() -> None:
    assert preset_names() == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "path", [None, *sorted((ROOT / "configs").glob("*.toml"))], ids=lambda path: path and path.stem
)
def test_every_preset_makes_a_config_of_every_file(name: str, path: Path | None) -> None:
    config = load_config(path, ["--coordinator.address=tcp://127.0.0.1:0"], name)
    payload_format(config)  # ranks that leave no room
    resolve(config.net)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_for_and_is_what_it_sets(name: str) -> None:
    preset = load_preset(name)
    assert len(preset.purpose) > 60
    assert "#" not in preset.purpose
    resolved = flat(to_tree(load_config(None, (), name)))
    wanted = flat(preset.tree)
    assert wanted.keys() <= {key.path for key in describe(Config)}
    assert {key: resolved[key] for key in wanted} == wanted


def test_the_paper_preset_is_the_papers_setting() -> None:
    config = load_config(None, (), "paper")
    compress, train = config.compress, config.train
    assert (compress.k_share, compress.v_share, compress.scope, compress.basis) == (0.98, 0.95, "head", "weights")
    assert (compress.rotation, compress.generator_norm, compress.generators) == ("taylor2", "frobenius", 1)
    assert (compress.clip, compress.theta, compress.own) == (0.5, "chunk", "exact")
    assert (compress.warmup_steps, compress.refresh_every, compress.dense_last_layers) == (500, 0, 1)
    assert (train.steps, train.lr, train.weight_decay, train.sync_every) == (10_000, 3e-4, 0.01, 200)


def test_the_other_presets_keep_what_they_promise() -> None:
    exact, home, datacenter = (load_config(None, (), name) for name in ("exact", "home", "datacenter"))
    assert (exact.compress.mode, exact.compress.format, exact.train.sync_every) == ("dense", "float32", 1)
    assert len(home.compressed) == home.model.layers
    assert (home.compress.format, home.compress.grad_format) == ("int8", "int8")
    line = resolve(home.net)
    assert line.scope == "nic"
    assert line.rate_bps is not None
    assert line.rate_bps <= 50e6
    assert datacenter.compress.mode == "dense"
    assert resolve(datacenter.net).rate_bps == 100e9


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_trains_tiny(name: str, tmp_path: Path) -> None:
    """Two steps on two ranks in this process: the warm start, and what comes after it."""
    small = ["--model.context", "32", "--train.batch", "1", "--train.eval_batches", "1"]
    short = ["--train.steps", "2", "--compress.warmup_steps", "1", "--compress.calibration_batches", "1"]
    config = load_config(TINY, [*small, *short], name)
    lead, trainers = train(config, WORLDS["2x2"], tmp_path)
    assert len(lead.losses()) == 2
    assert all(math.isfinite(loss) for loss in lead.losses())
    compressed = [codec for _, codec in trainers[0].model.codecs()]
    assert bool(compressed) == (config.compress.mode == "subspace")


def test_defaults_preset_file_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[train]\nsync_every = 5\n")
    config = load_config(path, ["--compress.format", "int8"], "home")
    assert (config.train.sync_every, config.compress.format) == (5, "int8")  # the file's, the command line's
    assert (config.compress.dense_last_layers, config.net.scope) == (0, "nic")  # the preset's
    assert config.train.batch == Config().train.batch


def test_a_file_may_name_its_preset_and_the_saved_config_holds_the_values(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.toml", tmp_path / "saved.toml"
    path.write_text('preset = "home"\n[train]\nsync_every = 5\n')
    config = load_config(path)
    assert (config.compress.format, config.train.sync_every) == ("int8", 5)
    save_config(config, saved)
    assert "preset" not in tomllib.loads(saved.read_text())
    assert load_config(saved) == config
    assert load_config(path, (), "exact").compress.mode == "dense"  # the command line's, in place of the file's


@pytest.mark.parametrize(
    ("text", "preset", "message"),
    [
        ("", "hom", "--preset 'hom': no such preset; there are datacenter, exact, home, paper; did you mean home?"),
        ("", "../home", "--preset '../home': no such preset"),
        ('preset = "papr"', "", "preset = 'papr': no such preset"),
        ("preset = 3", "", "preset = 3: expected the name of a preset, in quotes"),
    ],
)
def test_a_preset_that_is_not_there(text: str, preset: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, (), preset)
    assert str(caught.value).startswith(message)
