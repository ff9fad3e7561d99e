"""What a study concludes: the context gain, when it may be given, and the bytes of each arm."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from node.exchange.passes import PassSpec
from node.lab.study.document import document
from node.lab.study.far import FAR, TEXT
from node.lab.study.figures import Spread, Traffic, figures, traffic
from node.lab.study.measure import payload_bytes
from node.lab.study.picture import draw, looks, scale_bytes
from node.lab.study.record import Recipe, Results, record_text
from node.lab.study.table import Study, load_study, study_names
from node.train.from_config import payload_format


def study() -> Study:
    return load_study("control")


def page(results: Results, study: Study, seeds: int = 3) -> str:
    return document(Recipe(study.name, "", seeds, ()), study, figures(study, results), results)


def results(**losses: list[float]) -> dict[str, list[dict[str, object]]]:
    """Results of the control study, every arm with the method's losses where none are given."""
    facts = {"heldout_tokens": 100, "cpu_s": 60.0, "host": "a machine", "code": "abc", "curve": [], "stable_rank": []}
    of_arm = {"dense": losses["dense"], "local-only": losses["local"]}
    sent = {arm.name: payload_bytes(arm.config, payload_format(arm.config)) for arm in study().arms}
    return {
        arm.name: [
            facts | {"bytes": sent[arm.name], "heldout_loss": loss} for loss in of_arm.get(arm.name, losses["method"])
        ]
        for arm in study().arms
    }


def test_spread() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.std) == (2.0, 1.0)
    assert math.isnan(Spread.of([1.0]).std)


def test_gain_retained_is_taken_seed_by_seed() -> None:
    found = figures(study(), results(dense=[2.0, 3.0, 4.0], local=[3.0, 4.1, 4.9], method=[2.1, 3.11, 4.09]))
    assert found.clear
    assert found.gain.mean == pytest.approx(1.0)
    method = next(line for line in found.lines if line.arm == "method")
    assert method.retained is not None
    assert method.retained.mean == pytest.approx(0.9)
    assert method.retained.std == pytest.approx(0.0, abs=1e-9)
    assert method.gap.mean == pytest.approx(0.1)
    text = page(results(dense=[2.0, 3.0, 4.0], local=[3.0, 4.1, 4.9], method=[2.1, 3.11, 4.09]), study())
    (row,) = (line for line in text.splitlines() if line.startswith("| method "))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:5] == ["3.1000 ± 0.9950", "+0.1000 ± 0.0100", "90.0 ± 0.0 %"]


def test_a_gain_within_the_noise_is_said_to_be_none() -> None:
    noisy = results(dense=[2.0, 2.0, 2.0], local=[2.2, 2.1, 2.0], method=[2.1, 2.1, 2.1])
    found = figures(study(), noisy)
    assert not found.clear
    assert all(line.retained is None for line in found.lines)
    assert "not above 3 standard deviations" in page(noisy, study())


def test_one_seed_shows_no_noise_and_so_no_gain_retained() -> None:
    single = results(dense=[2.0], local=[3.0], method=[2.1])
    found = figures(study(), single)
    assert all(line.retained is None for line in found.lines)
    text = page(single, study(), seeds=1)
    assert "from one seed" in text
    assert "    isthmus study control --seeds 1\n" in text
    assert record_text(Recipe("control", "", 1, ()), single).count("\n") == 1 + len(study().arms)


def test_bytes_are_those_of_the_formula() -> None:
    arms = {arm.name: arm.config for arm in study().arms}

    def of(name: str) -> Traffic:
        return traffic([{"bytes": payload_bytes(arms[name], payload_format(arms[name]))}])

    model, method = arms["dense"].model, arms["method"]
    assert of("dense") == Traffic(None, 2 * 2 * model.d_kv, None, 0.0, 0.0, 2 * 2 * model.d_kv, 0.0)  # bfloat16
    assert of("local-only") == Traffic(None, 0.0, None, 1.0, 1.0, 0.0, 1.0)

    found, payload = of("method"), payload_format(method)
    wide = load_study("control", "", ["--compress.grad_format", "int8"]).arms[2].config
    spec = PassSpec(model.chunk_tokens, compressed=True)
    per_token = [payload.chunk_bytes(layer, spec) / (method.train.batch * spec.tokens) for layer in range(model.layers)]
    assert found.compressed_bytes == pytest.approx(per_token[0])
    assert found.compressed_saving == pytest.approx(1 - per_token[0] / (4 * model.d_kv))
    assert found.all_saving == pytest.approx(1 - sum(per_token) / (4 * model.d_kv * model.layers))
    assert found.returned_bytes == found.mean_layer_bytes
    eight = traffic([{"bytes": payload_bytes(wide, payload_format(wide))}])  # gradients in a narrower format
    assert eight.returned_bytes < found.returned_bytes
    assert found.all_saving < eight.both_saving
    assert found.run_saving < found.all_saving  # the warm start is uncompressed
    alike = of("method, last layer alike")
    assert (alike.compressed_bytes, alike.mean_layer_bytes) == (found.compressed_bytes, found.compressed_bytes)

    whole, narrow = of("only the last layer sees far, whole"), of("only the last layer sees far, compressed")
    assert (whole.compressed_bytes, whole.mean_layer_bytes) == (None, 4 * model.d_kv / model.layers)
    last_alone = payload_format(arms["only the last layer sees far, compressed"])
    last = last_alone.chunk_bytes(model.layers - 1, spec) / (method.train.batch * spec.tokens)
    assert narrow.compressed_bytes == pytest.approx(last)
    assert narrow.mean_layer_bytes == pytest.approx(last / model.layers)


def test_the_tail_counts_in_the_bytes_of_the_training() -> None:
    arms = {arm.name: arm.config for arm in load_study("unplug").arms}
    found = {name: traffic([{"bytes": payload_bytes(config, payload_format(config))}]) for name, config in arms.items()}
    assert found["50 %"].all_saving == found["not removed"].all_saving
    savings = [found[name].run_saving for name in ("50 %", "70 %", "90 %", "99 %", "not removed")]
    assert savings == sorted(savings)
    # 30 steps of warm start, 120 compressed, 150 whole.
    assert found["50 %"].run_saving == pytest.approx(found["50 %"].all_saving * 120 / 300)


def test_an_arm_that_leaks_is_marked_and_retains_nothing() -> None:
    leaky = load_study("own-chunk")
    (name,) = (arm.name for arm in leaky.arms if arm.config.leaks)
    one = results(dense=[2.0, 2.0], local=[3.0, 3.0], method=[2.1, 2.1])
    of_arm = {arm.name: one.get(arm.name, one["method"]) for arm in leaky.arms}
    text = page(of_arm, leaky, seeds=2)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} (leaks) "))
    assert row.split("|")[4].strip() == "–"


def test_an_arm_that_leaks_no_more_at_the_end_is_not_marked() -> None:
    leaky = load_study("own-chunk", "", ["--compress.unplug_step", "200"])
    one = results(dense=[2.0], local=[3.0], method=[2.1])
    of_arm = {arm.name: one.get(arm.name, one["method"]) for arm in leaky.arms}
    assert any(arm.config.leaks for arm in leaky.arms)
    assert not any(line.leaks for line in figures(leaky, of_arm).lines)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    one = results(dense=[2.0, 2.1], local=[3.0, 3.1], method=[2.1, 2.2])
    drawn: dict[str, Any] = {
        "curve": [{"step": 0.0, "heldout_loss": 5.0}, {"step": 10.0, "heldout_loss": 2.0}],
        "position_loss_sum": [0.0, 3.0, 4.0],
        "position_tokens": [0.0, 2.0, 2.0],
    }
    of_arm = {arm: [result | drawn for result in of_seed] for arm, of_seed in one.items()}
    path = draw(study(), figures(study(), of_arm), of_arm, tmp_path / "control.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_far_gains_where_runs_were_scored(tmp_path: Path) -> None:
    one = results(dense=[2.0], local=[3.0], method=[2.1])
    drawn: dict[str, Any] = {
        "curve": [{"step": 0.0, "heldout_loss": 5.0}],
        "position_loss_sum": [0.0, 3.0],
        "position_tokens": [0.0, 2.0],
    }
    scored = {"local-only": 3.0, "dense": 2.0}
    of_arm = {
        arm: [result | drawn | {"documents": documents(scored.get(arm, 2.1))} for result in of_seed]
        for arm, of_seed in one.items()
    }
    found = figures(study(), of_arm)
    assert found.far is not None
    assert found.far.lines["method"].far.mean == pytest.approx(0.9)
    assert draw(study(), found, of_arm, tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")
    text = page(of_arm, study(), seeds=1)
    assert "**1.000 [1.000, 1.000] nats**" in text
    assert "90.0 [90.0, 90.0] %" in text


def documents(loss: float) -> dict[str, list[list[float]]]:
    """Two documents with this mean loss in every class."""
    return {name: [[10 * loss, 10], [20 * loss, 20]] for name in (FAR, "border", TEXT)}


def test_no_two_arms_of_a_study_look_alike() -> None:
    most = max(len(load_study(name).arms) for name in study_names())
    assert most <= 24
    assert len({look.colour for look in looks(8)}) == 8
    assert len({(look.colour, look.marker) for look in looks(40)}) == 40
    assert len({(look.colour, str(look.dashes)) for look in looks(24)}) == 24


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.4), (20.5, 512.0), (142.2, 512.0), (0.3, 5000.0)])
def test_ticks_of_bytes_are_plain_numbers_with_room_between(low: float, high: float) -> None:
    figure = Figure(figsize=(4, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    scale_bytes(axes, [low, high])
    figure.canvas.draw()
    shown = [tick.label1 for tick in axes.xaxis.get_major_ticks() + axes.xaxis.get_minor_ticks()]
    boxes = [label.get_window_extent() for label in shown if label.get_text()]
    assert [float(label.get_text()) for label in shown if label.get_text()]
    assert all(one.x1 < other.x0 for one, other in pairwise(sorted(boxes, key=lambda box: box.x0)))
