"""The pages that the planner writes: its trials are configs that run, and the paper's table says what it is to say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import ROOT
from helpers.small import schedule_of

from netem.profile import resolve
from node.config import Config, load_config
from node.lab.measured import COLD_STEPS, LEAST_STEPS
from node.lab.plan import layouts, paper, trials
from node.lab.plan.costs import stated
from node.lab.plan.lines import lines_of, without_limits
from node.lab.plan.model import Model
from node.measure.devices import device
from node.train.from_config import payload_format
from node.train.schedule import WEIGHTS


def trial(name: str) -> Config:
    return load_config(ROOT / trials.BASE, [f"--{key}={value}" for key, value in trials.settings_of(name).items()])


@pytest.mark.parametrize("name", [*trials.TRIALS, *trials.OVERLAP])
def test_a_trial_runs_and_has_ordinary_steps(name: str) -> None:
    config = trial(name)
    payload_format(config)
    steps = range(config.compress.warm_start_steps + 2, config.train.steps + 1)
    assert sum(WEIGHTS not in schedule_of(config).rounds(step) for step in steps) >= COLD_STEPS + LEAST_STEPS


@pytest.mark.parametrize(
    "what",
    [
        lambda config: config.compress.mode,
        lambda config: config.model.layers,
        lambda config: config.coordinator.nodes,
        lambda config: config.model.context,
    ],
)
def test_both_halves_of_the_trials_have_everything(what: Callable[[Config], object]) -> None:
    names = sorted(trials.TRIALS)
    assert len(names) >= 12
    fitted, unseen = ({what(trial(name)) for name in half} for half in (names[::2], names[1::2]))
    assert fitted == unseen


@pytest.mark.parametrize(
    "what",
    [
        lambda config: config.compress.mode,
        lambda config: config.train.micro_batches,
        lambda config: config.coordinator.assignment,
    ],
)
def test_both_halves_of_the_trials_of_overlap_have_everything(what: Callable[[Config], object]) -> None:
    names = sorted(trials.OVERLAP)
    fitted, unseen = ({what(trial(name)) for name in half} for half in (names[::2], names[1::2]))
    assert fitted == unseen


def test_an_unknown_trial_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert trials.main(["99-none"]) == 2
    assert "99-none: no such trial" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_mfu_is_that_at_which_the_centralized_run_is_as_fast_as_reported() -> None:
    config = paper.config_of(paper.WIDE, (), "nic")
    mfu = paper.mfu_of(config, paper.CENTRALIZED)
    model = Model(config)
    step_s = model.simulate(stated(device("a100"), mfu), lines_of(resolve(config.net), 8)).step_s
    assert model.tokens / step_s == pytest.approx(paper.CENTRALIZED, rel=0.005)


def test_the_uncompressed_run_takes_at_least_its_bytes() -> None:
    """Sixteen transfers of 134 MB on each link; seven times as much through each NIC."""
    uncompressed = paper.SETTINGS[0]
    costs = stated(device("a100"), 0.5)
    transfers_s = 16 * 16384 * 2048 * 2 * 2 * 8 / 3e8
    by_scope = {scope: paper.predicted(uncompressed, (), scope, costs) for scope in paper.SCOPES}
    for scope, times in (("link", 1), ("nic", 7)):
        line = by_scope[scope]  # type: ignore[index]
        assert times * transfers_s < line.step_s < line.apart_s
        assert line.needs_bps is not None
        assert line.needs_bps > 3e8


LAYOUTS = (ROOT / layouts.DOCUMENT).read_text(encoding="utf-8")
ROWS = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in LAYOUTS.splitlines() if line[:1] == "|"}


@pytest.mark.parametrize("stages", [4, 8])
def test_the_page_of_layouts_is_current(stages: int) -> None:
    """`python -m node.lab.plan.layouts` writes it; the layouts with the fewest nodes are planned here again."""
    assert tuple(layouts.speed_row(stages)) in ROWS
    assert tuple(layouts.layout_row(stages)) in ROWS


@pytest.mark.parametrize("mode", layouts.MILLION_MODES, ids=lambda mode: f"{mode.name} {mode.scope}")
def test_its_million_tokens_are_current(mode: layouts.Mode) -> None:
    single, pipelines = layouts.MILLIONS
    assert tuple(layouts.million_row(single, mode)) in ROWS
    sent = layouts.sent_bytes(pipelines.model(mode))
    assert any(f"{sum(map(sum, sent)):,}" in row and f"{max(map(sum, sent)):,}" in row for row in ROWS)


@pytest.mark.parametrize("mode", layouts.MILLION_MODES, ids=lambda mode: f"{mode.name} {mode.scope}")
def test_its_stages_in_different_nodes_are_current(mode: layouts.Mode) -> None:
    assert tuple(layouts.across_row(8, mode)) in ROWS


def test_its_bytes_are_those_of_the_simulated_network() -> None:
    """A million tokens on 16 nodes of four stages, to the byte; as fast as can be, since only bytes are asked for."""
    model = layouts.MILLIONS[1].model(layouts.MODES[1])
    outcome = model.simulate(stated(device("a100"), 0.4), without_limits(16))
    assert outcome.sent_bytes.tolist() == layouts.sent_bytes(model)


@pytest.mark.slow
def test_the_whole_page_of_layouts_is_current() -> None:
    assert layouts.document() == LAYOUTS
