"""Studies as data: every one that is listed can run, and a mistake in one is found before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netem.errors import ConfigError
from node.cli import main
from node.lab.study import table
from node.lab.study.runs import digest_of, from_trunks, read_result, runs_of
from node.lab.study.table import DENSE, LOCAL, Study, base_names, load_study, merge, study_names
from node.lab.study.version import statements
from node.train.from_config import payload_format

PRETRAINED = "smollm2"
BUDGETED = ("far", "frontier", "last-layer", "learned", "ranks", "sync")
"""Studies whose arms have budgets in bytes that are for a few layers."""


@pytest.mark.parametrize("name", study_names())
@pytest.mark.parametrize("base", sorted(set(base_names()) - {PRETRAINED}))
def test_every_study_can_run_on_every_base(name: str, base: str) -> None:
    study = load_study(name, base)
    assert {DENSE, LOCAL} <= {arm.name for arm in study.arms}
    for arm in study.arms:
        payload_format(arm.config)
    digests = [run.digest for run in runs_of(study, 2)]
    if not study.trunk:  # after a trunk there is no warm start, in which alone some arms differ
        assert len(set(digests)) == len(digests), "two arms are the same"


@pytest.mark.parametrize("name", study_names())
def test_the_pretrained_base_runs_every_study_but_those_with_budgets_for_few_layers(name: str) -> None:
    """Its model need not be there to look at a study on it."""
    study = load_study(name, PRETRAINED)
    assert all(arm.config.model.init and arm.config.model.layers == 30 for arm in study.arms)
    if name in BUDGETED:
        with pytest.raises(ConfigError, match=r"arm '.*': compress.budget_bytes_per_token = .* raise it"):
            _payloads(study)
    else:
        _payloads(study)


def _payloads(study: Study) -> None:
    for arm in study.arms:
        try:
            payload_format(arm.config)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None


@pytest.mark.parametrize("name", study_names())
def test_every_study_can_be_made_shorter(name: str) -> None:
    assert {arm.config.train.steps for arm in load_study(name, "", ["--train.steps", "40"]).arms} == {40}


def test_arms_start_from_the_trunk_of_their_seed() -> None:
    study = load_study("far", "", ["--train.steps", "7"])
    assert [stage.model.context for stage in study.trunk] == [128, 512]
    assert all(stage.compress.mode == "dense" and stage.train.steps > 7 for stage in study.trunk)
    first, *others = runs_of(study, 2)
    assert first.trunk is not None
    assert first.trunk.keeps_weights
    trunks = {run.seed: run.trunk for run in others if run.trunk}
    assert trunks[0].digest == first.trunk.digest != trunks[1].digest
    noisy = next(run for run in others if run.noise)
    assert noisy.config == first.config
    assert noisy.digest != first.digest


def test_runs_may_start_from_a_trunk_of_other_code() -> None:
    runs = runs_of(load_study("far"), 2)
    found = from_trunks(runs, {0: "ab"})
    assert [run.trunk.digest for run in found if run.trunk and run.seed == 0] == ["ab"] * (len(runs) // 2)
    assert not {run.digest for run in found if run.seed == 0} & {run.digest for run in runs}
    assert [run.digest for run in found if run.seed == 1] == [run.digest for run in runs if run.seed == 1]


def test_shares_of_the_steps_become_steps() -> None:
    arms = {arm.name: arm.config.compress for arm in load_study("warmup", "", ["--train.steps", "200"]).arms}
    assert [arms[name].warmup_steps for name in ("0 %", "10 %", "50 %")] == [0, 20, 100]
    few = {arm.name: arm.config.compress for arm in load_study("unplug", "", ["--train.steps", "20"]).arms}
    assert [few[name].unplug_step for name in ("not removed", "50 %", "99 %")] == [0, 10, 19]


def test_a_setting_that_does_not_exist_stops_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    load = table._load

    def with_typo(folder: Any, name: str, what: str) -> Any:
        tree = load(folder, name, what)
        return merge(tree, {"arms": {"method": {"compress": {"rotaton": "fixed"}}}}) if what == "study" else tree

    monkeypatch.setattr(table, "_load", with_typo)
    with pytest.raises(ConfigError, match=r"study control, arm 'method': compress.rotaton .* did you mean rotation"):
        load_study("control")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["contrl"], "contrl: no such study; there are baselines, "),
        (["control", "--base", "novel"], "novel: no such base; there are copies, novels-bytes"),
        (["control", "--train.stepz", "5"], "study control, arm 'dense': train.stepz = 5: unknown key"),
        (["control", "--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["control", "--checkpoint", "x"], "--checkpoint: goes with `isthmus study spectrum`"),
        (["spectrum", "--checkpoint", "."], ".: holds no .safetensors file"),
        (["--train.steps=5"], "name a study"),
        (
            ["control", "--base", "smollm2"],
            "study control on smollm2 is skipped: model.init = 'outputs/smollm2' is not installed here; docs/",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_result_is_of_a_config_a_seed_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_study("control").arms[0].config
    digest = digest_of(config)

    def changed(section: str, **settings: Any) -> str:
        part = msgspec.structs.replace(getattr(config, section), **settings)
        return digest_of(msgspec.structs.replace(config, **{section: part}))

    assert changed("run", name="other", outputs="elsewhere", threads=3) == digest
    assert changed("run", seed=5) != digest
    assert changed("train", lr=1.0) != digest
    assert changed("coordinator", nodes=2) != digest
    monkeypatch.setattr("node.lab.study.runs.code_version", lambda: "other")
    assert digest_of(config) != digest
    run = runs_of(load_study("control"), 1)[0]
    assert read_result(tmp_path, run) is None
    result = {"heldout_loss": 1.5, "digest": run.digest}
    (tmp_path / f"{run.digest}.json").write_text(json.dumps(result))
    assert read_result(tmp_path, run) == result


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 100_000, b"{}"])
def test_a_file_that_is_no_result_is_named(text: bytes, tmp_path: Path) -> None:
    run = runs_of(load_study("control"), 1)[0]
    (tmp_path / f"{run.digest}.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"not the result of a run; delete it, and the study runs dense, seed 0"):
        read_result(tmp_path, run)


def test_the_code_is_its_statements() -> None:
    assert statements('"""Doc."""\nx = 1  # why\n') == statements("x  =  1")
    assert statements("def f():\n    'doc'\n    return 1") == statements("def f():\n    return 1")
    assert statements("x = 1") != statements("x = 2")


def test_studies_are_listed_without_torch() -> None:
    code = "import sys; from node.cli import main; main(['study']); assert 'torch' not in sys.modules, 'slow'"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == study_names()
