"""Fitting costs to runs, and judging the planner by runs that it has not seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from helpers.small import small_config

from coordinator.records.folder import CONFIG, METRICS
from netem.config import convert
from netem.errors import ConfigError
from node.cli import main
from node.config import Config, save_config, to_tree
from node.lab.measured import Measured, read_measured
from node.lab.plan.costs import Costs
from node.lab.plan.fit import Case, case, fit
from node.lab.plan.text import seconds
from node.lab.plan.validate import table, validate
from node.lab.verdict import network_cost, next_steps

TINY = ROOT / "configs" / "tiny.toml"
TRUTH = Costs(flops_per_s=2e10, element_s=3e-9, call_s=2e-4, byte_s=5e-10, step_s=8e-3)


def config_of(mode: str, nodes: int, rate: str, context: int = 512, d_model: int = 64) -> Config:
    tree = to_tree(small_config(mode, model={"context": context, "chunks": 4, "d_model": d_model}))
    tree["coordinator"]["nodes"] = nodes
    tree["net"] |= {"profile": "internet-300mbps", "rate": rate, "latency": "5 ms"}
    tree["train"] |= {"steps": 100, "sync_every": 10}
    tree["compress"]["warmup_steps"] = 4
    return convert(Config, tree)


def made_up(name: str, config: Config, costs: Costs, noise: float = 0.0) -> Case:
    """A run that took what `costs` say, give or take."""
    nothing = case(Measured(name, config, 10, 1.0, 1.0, {}, 0.0))
    step_s, busy_s = nothing.predict(costs)
    measured = nothing.measured._replace(step_s=step_s * (1 + noise), busy_s=busy_s * (1 + noise))
    return nothing._replace(measured=measured)


def runs(noise: float = 0.0) -> list[Case]:
    cases, draws = [], np.random.default_rng(0)
    for context, d_model in ((256, 64), (512, 128), (1024, 64)):
        for nodes in (1, 4):
            for mode, rate in (("subspace", "20 Mbit/s"), ("dense", "200 Mbit/s"), ("dense", "20 Mbit/s")):
                config = config_of(mode, nodes, rate, context, d_model)
                cases.append(made_up(f"run-{len(cases):02}", config, TRUTH, noise * draws.standard_normal()))
    return cases


def test_the_last_lines_of_a_run_say_what_its_network_cost(tmp_path: Path) -> None:
    """A run that took what the planner says: the lines are the planner's figures for it, and for its dense twin."""
    trees = [to_tree(config_of(mode, 4, "5 Mbit/s")) for mode in ("subspace", "dense")]
    for tree in trees:
        tree["compress"] |= {"dense_last_layers": 0, "format": "bfloat16"}
    config, dense = (convert(Config, tree) for tree in trees)
    step_s, busy_s = made_up("", config, TRUTH).predict(TRUTH)
    save_config(config, tmp_path / CONFIG)
    nodes = {f"node-{rank}": {"step_s": step_s, "exposed_s": step_s - busy_s} for rank in range(4)}
    records = [
        {"step": step, "time": step * step_s, "step_s": step_s, "loss": 3.0, "nodes": nodes} for step in range(1, 101)
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = dict(network_cost(tmp_path))
    assert lines["link"].startswith(f"a step took {seconds(step_s)}; on a network without limits it would take ")
    truth = made_up("", dense, TRUTH).predict(TRUTH)[0] / step_s
    found = re.search(r"([\d.]+) times as long", lines["uncompressed"])
    assert found
    assert float(found[1]) == pytest.approx(truth, rel=0.1)
    assert truth > 1.2


def test_a_run_too_short_to_tell_gets_no_such_lines(tmp_path: Path) -> None:
    save_config(config_of("subspace", 4, "5 Mbit/s"), tmp_path / CONFIG)
    (tmp_path / METRICS).write_text('{"step": 1, "step_s": 1.0, "nodes": {}}\n')
    assert network_cost(tmp_path) == []


def test_what_to_try_next_exports_only_what_can_be_exported() -> None:
    config, path = config_of("subspace", 4, "5 Mbit/s"), Path("a.toml")
    assert not any("export" in step for step in next_steps(config, path))
    tree = to_tree(config)
    tree["compress"]["unplug_step"] = 90
    assert next_steps(convert(Config, tree), path)[0] == "isthmus export outputs/run run-hf"


def test_costs_come_back_from_the_runs_that_they_make() -> None:
    validation = validate(runs(), cores=0)
    assert validation.median_error < 0.01
    assert max(abs(row.error) for row in validation.rows) < 0.05
    kept, total = validation.order
    assert kept == total == 6


def test_noise_is_not_fitted() -> None:
    """With 5 % of noise in what was measured, what was not seen is predicted as well as noise allows."""
    validation = validate(runs(noise=0.05), cores=0)
    assert validation.median_error < 0.08


def test_one_run_is_enough_to_scale_the_costs() -> None:
    one = made_up("one", config_of("subspace", 2, "50 Mbit/s"), TRUTH)
    step_s, busy_s = one.predict(fit([one], cores=0))
    assert step_s == pytest.approx(one.measured.step_s, rel=0.02)
    assert busy_s == pytest.approx(one.measured.busy_s, rel=0.05)


def test_the_verdict_names_what_is_wrong() -> None:
    """A planner that is wrong by half says so, and that it turns an order round."""
    cases = runs()
    wrong = [
        run._replace(measured=run.measured._replace(step_s=run.measured.step_s * (4 if place % 2 else 1)))
        for place, run in enumerate(cases)
    ]
    validation = validate(wrong, cores=0)
    assert validation.median_error > 0.5
    kept, total = validation.order
    assert kept < total
    assert f"kept in {kept} of {total}" in table(validation)


def test_too_few_runs_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="expected at least 2"):
        validate(runs()[:1])


def write_run(folder: Path, config: Config, steps: int) -> Path:
    """A run's files, as the recorder writes them: steps with averaging and the first ones take longer."""
    folder.mkdir()
    save_config(config, folder / CONFIG)
    lines = []
    for step in range(1, steps + 1):
        averages = step % config.train.sync_every == 0
        step_s = 0.2 + (5.0 if averages else 0.0) + (1.0 if step <= config.compress.warm_start_steps + 4 else 0.0)
        node = {"step_s": step_s, "exposed_s": 0.05, "averaging_s": 5.0 if averages else 0.0}
        lines.append(json.dumps({"step": step, "loss": 1.0, **node, "nodes": {"node-0": node, "node-1": node}}))
    (folder / METRICS).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("part", ["", METRICS])
def test_ordinary_steps_are_those_without_averaging_warm_start_and_cold_caches(tmp_path: Path, part: str) -> None:
    folder = write_run(tmp_path / "run", config_of("subspace", 2, "50 Mbit/s"), steps=30)
    measured = read_measured(folder / part)
    assert measured.name == "run"
    assert measured.steps == 25 - 3 - 3  # after step 5; averaging at 10, 20 and 30; three cold ones
    assert measured.step_s == pytest.approx(0.2)
    assert measured.busy_s == pytest.approx(0.15)
    assert measured.busy_by_node_s == {"node-0": pytest.approx(0.15), "node-1": pytest.approx(0.15)}
    assert measured.round_s == 5.0


def test_a_run_too_short_to_have_ordinary_steps_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "short", config_of("subspace", 2, "50 Mbit/s"), steps=9)
    with pytest.raises(ConfigError, match="short: 1 ordinary steps"):
        read_measured(folder)


@pytest.mark.parametrize("lost", ["nodes", "step_s"])
def test_records_without_the_figures_do_not_count(lost: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config_of("subspace", 2, "50 Mbit/s"), steps=30)
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    (folder / METRICS).write_text("".join(json.dumps(record | {lost: None}) + "\n" for record in records))
    with pytest.raises(ConfigError, match="run: 0 ordinary steps"):
        read_measured(folder)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (METRICS, "[]\n", "metrics.jsonl, line 1: expected a record with a step"),
        (METRICS, "{\n", "metrics.jsonl, line 1: "),
        (METRICS, '{"step": 1, "loss": 1.0, "step_s": NaN}\n', "run: 0 ordinary steps"),
        (CONFIG, "[model\n", "config.toml: not valid TOML"),
        (CONFIG, "[models]\n", "models"),
    ],
)
@pytest.mark.parametrize("option", ["--fit", "--validate"])
def test_a_folder_that_holds_no_run_is_one_line(
    option: str, file: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", config_of("subspace", 2, "50 Mbit/s"), steps=30)
    (folder / file).write_text(text)
    arguments = [str(TINY), "--fit", str(folder)] if option == "--fit" else ["--validate", str(folder), str(folder)]
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
