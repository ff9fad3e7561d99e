"""`isthmus experiment figure2`: equal tokens, the target's clock, and what is not run twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.small import schedule_of
from helpers.tunnel_runs import A100, HERE, bench_of_work, write_run

from coordinator.records.folder import METRICS, mark_complete
from netem.errors import ConfigError, RunAborted
from node.cli import main
from node.commands import experiment as command
from node.config import Config, load_config
from node.lab.experiment.arms import ARMS, arms_named, check_steps, training
from node.lab.experiment.clock import emulated_s, step_alone_s
from node.lab.experiment.stage import (
    Stage,
    keep,
    kept,
    load_arm_target,
    small_of,
    stage,
    with_compress,
    with_payloads,
)
from node.lab.measured import read_measured
from node.lab.plan.model import Model
from node.lab.tunnel.bench import Bench
from node.lab.tunnel.bench_node import mode_of
from node.lab.tunnel.similitude import body_of
from node.train.schedule import WEIGHTS

STEPS = 20


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    handler = signal.getsignal(signal.SIGTERM)  # the command sets its own
    yield
    signal.signal(signal.SIGTERM, handler)


def benches(small: Config) -> dict[str, Bench]:
    return {mode: bench_of_work(mode_of(small, mode), crowding=1.5) for mode in ("subspace", "dense")}


@cache
def staged(name: str) -> Stage:
    (arm,) = arms_named((name,))
    target = load_arm_target(arm, ())
    compressed = load_arm_target(ARMS[1], ())
    small = small_of(compressed, load_config(ROOT / "configs" / "figure.toml"), Path("runs"))
    return stage(arm, target, with_compress(small, target), A100, benches(small))


def config_of(one: Stage, steps: int = STEPS) -> Config:
    return training(one.small, one.arm, Path("profile.toml"), steps)


@pytest.fixture
def _profile(tmp_path: Path) -> None:
    (tmp_path / "profile.toml").write_text('rate = "5 Mbit/s"\nlatency = "2 ms"\nscope = "link"\n')


@pytest.mark.usefixtures("_profile")
def test_all_arms_have_the_same_tokens_and_averagings_at_the_same_step() -> None:
    configs = {arm.name: config_of(staged(arm.name)) for arm in ARMS}
    base = configs["uncompressed"]
    for name, config in configs.items():
        assert config.data == base.data
        assert config.train == base.train
        assert config.run.seed == base.run.seed
        assert config.model == base.model
        for step in range(1, STEPS + 1):
            assert schedule_of(config).pass_spec(step).tokens == base.model.chunk_tokens, (name, step)
            extra = name == "compressed" and step == config.compress.warm_start_steps
            assert (WEIGHTS in schedule_of(config).rounds(step)) == (
                WEIGHTS in schedule_of(base).rounds(step) or extra
            ), (name, step)


def test_arms_send_what_their_names_say() -> None:
    whole = staged("uncompressed").bench.body.kinds["whole"].payload_bytes
    assert staged("topk10").bench.body.kinds["whole"].payload_bytes < 0.35 * whole
    assert staged("int4").bench.body.kinds["whole"].payload_bytes == pytest.approx(0.25 * whole, rel=0.05)
    assert staged("compressed").bench.body.kinds["compressed"].payload_bytes < 0.08 * whole
    assert set(staged("compressed").bench.body.kinds) == {"compressed"}


def test_the_network_of_centralized_alone_is_another() -> None:
    assert staged("centralized").goal.profile.name == "datacenter-100gbps"
    assert {staged(arm.name).goal.profile.name for arm in ARMS[1:]} == {"internet-300mbps"}


def test_a_bench_keeps_its_compute_and_gets_the_bytes_of_a_format() -> None:
    one = staged("topk10")
    dense = bench_of_work(mode_of(one.small, "dense"))
    assert with_payloads(dense, mode_of(one.small, "dense")).body == dense.body
    assert dense.body == body_of(Model(mode_of(one.small, "dense")), HERE)


@pytest.mark.usefixtures("_profile")
def test_the_clock_is_the_targets_and_leaves_averagings_out(tmp_path: Path) -> None:
    one = staged("uncompressed")
    config = config_of(one)
    write_run(tmp_path / "run", config, one.design, one.bench.body)
    records = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    verdict = one.judge(read_measured(tmp_path / "run"))
    clock = emulated_s(records, one, verdict)
    durations = [after - before for before, after in zip([0.0, *clock], clock, strict=False)]
    assert durations == pytest.approx([verdict.target_step_s] * STEPS)
    averaged = records[-1]["nodes"]["node-3"]
    assert averaged["averaging_s"] > 0
    assert step_alone_s(records[-1]) == pytest.approx(3 * one.bench.body.step_s)


def test_benches_are_kept_for_the_same_question_only(tmp_path: Path) -> None:
    small = staged("uncompressed").small
    made = benches(small)
    keep(tmp_path / "bench.json", {"steps": 20}, made)
    assert kept(tmp_path / "bench.json", {"steps": 20}, small) == made
    assert kept(tmp_path / "none.json", {"steps": 20}, small) is None
    with pytest.raises(ConfigError, match="holds other runs"):
        kept(tmp_path / "bench.json", {"steps": 40}, small)


@pytest.mark.parametrize("steps", [0, 10, 25])
def test_steps_must_be_shared_out(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="expected a multiple of 10"):
        check_steps(steps)
    assert main(["experiment", "figure2", "--steps", str(steps)]) == 2
    assert not Path("outputs").exists()


def test_an_unknown_arm_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "figure2", "--arm", "int8"]) == 2
    assert "--arm int8: no such arm" in capsys.readouterr().err


class Runs:
    """In place of real runs: writes what they would leave, and notes which ones were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.stop_at: dict[str, int] = {}
        """Steps after which a run is interrupted, once."""

    def __call__(self, config: Config) -> Config:
        self.asked.append((config.run.name, config.run.resume))
        name = config.run.name.removeprefix("calibrate-")
        one = staged(name)
        write_run(config.run.folder, config, one.design, one.bench.body)
        path = config.run.folder / METRICS
        records = [json.loads(line) | {"heldout_loss": 2.0, "tokens": 2048.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        if (stop := self.stop_at.pop(config.run.name, None)) is not None:
            if stop:
                mark_complete(config.run.folder, stop, config.coordinator.nodes)
            raise RunAborted("interrupted")
        mark_complete(config.run.folder, config.train.steps, config.coordinator.nodes)
        return config


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(command, "run_swarm", made)
    monkeypatch.setattr(command, "check_corpus", lambda _: None)
    monkeypatch.setattr(command, "measure", lambda config, *_: benches(config))
    monkeypatch.setattr(command, "stage", lambda arm, *_: staged(arm.name))
    return made


ASKED = ["experiment", "figure2", "--steps", str(STEPS), "--arm", "compressed", "--arm", "uncompressed"]
ASKED += ["--runs", "runs", "--png", "out/figure.png", "--page", "out/bench/figure2.md"]


def test_it_writes_the_page_and_runs_nothing_twice(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASKED) == 0
    both = [f"{what}{name}" for name in ("compressed", "uncompressed") for what in ("calibrate-", "")]
    assert runs.asked == [(name, False) for name in both]
    page = Path("out/bench/figure2.md").read_text()
    assert "![Loss over the emulated wall-clock and over steps, and tokens/s](../figure.png)" in page
    assert "compressed over uncompressed: " in page
    assert Path("out/figure.png").stat().st_size > 10_000
    figures = json.loads(Path("out/bench/figure2.json").read_text())["arms"]
    assert figures["uncompressed"]["emulated_s"] == sorted(figures["uncompressed"]["emulated_s"])
    assert len(figures["uncompressed"]["loss"]) == STEPS
    assert main(ASKED) == 0
    assert len(runs.asked) == 4
    assert Path("out/bench/figure2.md").read_text() == page


def test_runs_of_other_settings_are_not_taken_for_these(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASKED) == 0
    path = Path("runs/compressed/config.toml")
    path.write_text(path.read_text().replace("lr = 0.001", "lr = 0.002"))
    capsys.readouterr()
    assert main(ASKED) == 2
    assert "compressed was trained with train.lr = 0.002, and 0.001 is asked for" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_from_its_checkpoint_or_begins_again(runs: Runs) -> None:
    runs.stop_at = {"compressed": 8, "uncompressed": 0}
    assert main(ASKED) == 1
    assert main(ASKED) == 1
    assert main(ASKED) == 0
    assert runs.asked == [
        *(("calibrate-compressed", False), ("compressed", False), ("compressed", True)),
        *(("calibrate-uncompressed", False), ("uncompressed", False), ("uncompressed", False)),
    ]
