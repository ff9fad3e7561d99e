"""The check after a run: it holds where the run had the target's numbers, and flags those that it missed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tunnel_runs import A100, bench_of_work, target, write_run

from netem.errors import ConfigError
from node.config import Config
from node.lab.measured import read_measured
from node.lab.tunnel.bench import Bench
from node.lab.tunnel.bench_node import mode_of
from node.lab.tunnel.check import Verdict, judge
from node.lab.tunnel.design import Design, Goal, design, goal
from node.lab.tunnel.small import MODES, run_config, small_config

UNCOMPRESSED = MODES[2]


@pytest.fixture(autouse=True)
def _profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The profile that the runs' configs name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tunnel.toml").write_text('rate = "1 Mbit/s"\n', encoding="utf-8")


def built(*overrides: str) -> tuple[Goal, Bench, Design, Config]:
    """The tunnel of the uncompressed mode, by work alone, and its config."""
    one = goal(target(*overrides), UNCOMPRESSED, A100)
    small = small_config(target(*overrides), None, 12, Path("out"))
    bench = bench_of_work(mode_of(small, "dense"))
    made = design(one, bench.body)
    return one, bench, made, run_config(small, UNCOMPRESSED, Path("tunnel.toml"), made.sync_every)


def ran(
    folder: Path,
    one: Goal,
    bench: Bench,
    made: Design,
    config: Config,
    slower: float,
    late: float = 0.0,
    framing: float = 1.0,
) -> Verdict:
    write_run(folder, config, made, bench.body.slowed(slower), late, framing)
    return judge(one, made, bench, read_measured(folder))


def test_a_run_as_intended_holds_and_tells_the_targets_tokens(tmp_path: Path) -> None:
    one, bench, made, config = built()
    verdict = ran(tmp_path, one, bench, made, config, 1.0)
    assert verdict.held
    assert max(map(abs, verdict.off.values())) < 0.03  # whole steps between averagings
    assert verdict.measured.round_s == pytest.approx(
        one.numbers.averaging * made.sync_every * bench.body.step_s, rel=0.03
    )
    step_s = 3 * bench.body.step_s + verdict.measured.round_s / made.sync_every
    assert verdict.step_s == pytest.approx(step_s)
    assert verdict.tokens_per_s == pytest.approx(131072 / (step_s * made.scale.time))


@pytest.mark.parametrize("slower", [0.5, 0.88, 1.15, 2.0])
def test_a_run_that_computed_faster_or_slower_missed_and_says_by_how_much(tmp_path: Path, slower: float) -> None:
    one, bench, made, config = built()
    verdict = ran(tmp_path, one, bench, made, config, slower)
    assert not verdict.held
    assert verdict.missed == ["whole layer", "latency", "averaging"]
    assert verdict.off["whole layer"] == pytest.approx(1 / slower - 1)
    assert verdict.off["latency"] == pytest.approx(1 / slower - 1)


def test_the_next_run_is_corrected_by_the_one_before(tmp_path: Path) -> None:
    one, bench, made, config = built()
    missed = ran(tmp_path / "first", one, bench, made, config, 0.4, framing=1.2)
    better = design(one, missed.body, missed.measured.framing, missed.slower)
    assert better.lines.link_bps[0, 1] == pytest.approx(made.lines.link_bps[0, 1] / 0.4 * 1.2)
    assert ran(tmp_path / "second", one, bench, better, config, 0.4, framing=1.2).held


def test_wires_that_were_late_count_and_untrusted_runs_do_not_hold(tmp_path: Path) -> None:
    one, bench, made, config = built()
    verdict = ran(tmp_path, one, bench, made, config, 1.0, late=0.08)
    assert verdict.off["whole layer"] == pytest.approx(0.08)
    assert not verdict.missed
    assert verdict.measured.untrusted
    assert not verdict.held


def test_bytes_beside_the_payloads_count(tmp_path: Path) -> None:
    one, bench, made, config = built()
    verdict = ran(tmp_path, one, bench, made, config, 1.0, framing=1.25)
    assert verdict.missed == ["whole layer", "averaging"]
    assert verdict.off["whole layer"] == pytest.approx(0.25)


def test_exact_averaging_is_part_of_every_step(tmp_path: Path) -> None:
    one, bench, made, config = built("--train.sync_every=1")
    assert made.sync_every == config.train.sync_every == 1
    write_run(tmp_path, config, made, bench.body)
    measured = read_measured(tmp_path)
    assert measured.steps == config.train.steps - 4  # the first, and three that are cold
    verdict = judge(one, made, bench, measured)
    assert verdict.missed == ["averaging"]  # there is nothing to choose that would give it its share
    assert verdict.step_s == measured.step_s == pytest.approx(3 * bench.body.step_s + 2 * measured.round_s)


def test_a_run_too_short_is_no_run(tmp_path: Path) -> None:
    _, bench, made, config = built()
    write_run(tmp_path, config, made, bench.body)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"2 ordinary steps .* expected 3 or more"):
        read_measured(tmp_path)
