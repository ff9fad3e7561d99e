"""The picture of a study, NAME.png: held-out loss over training, by position in the context, and what bytes buy.

The third panel shows the gain retained where the study gives one, else the loss. Lines and points are means over seeds,
bands and bars ± one standard deviation, as in the page's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from node.lab.study.figures import Figures, Line, Result
from node.lab.study.record import Results
from node.lab.study.table import Study
from node.watch.style import RUN_LOOKS, save_png, styled_figure

GREY = "#888888"

Values = npt.NDArray[np.float64]


class Look(NamedTuple):
    """How an arm is drawn."""

    colour: str
    dashes: Any
    marker: str


def looks(count: int) -> list[Look]:
    """Looks of so many arms: 8 colours, 3 dashes and 5 markers in turn, so that the lines of 24 arms differ, and the
    points of 40."""
    colours, dashes = [*(colour for colour, _ in RUN_LOOKS), GREY], [dashes for _, dashes in RUN_LOOKS[:3]]
    endless = zip(cycle(colours), cycle(dashes), cycle("osD^v"), strict=False)
    return [Look(*look) for look, _ in zip(endless, range(count), strict=False)]


def draw(study: Study, found: Figures, results: Results, path: Path) -> Path:
    """Draw the study into the PNG `path`. Raises `ConfigError` where it cannot be written."""
    with styled_figure(13, 4.8 + 0.1 * len(results)) as figure:
        by_step, by_position, by_bytes = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
        for (arm, arm_results), line, look in zip(results.items(), found.lines, looks(len(results)), strict=True):
            _curve(by_step, arm, arm_results, look)
            _draw_spread(by_position, *_positions(study, arm_results), look._replace(marker=""), arm)
            _draw_point(by_bytes, _point(found, line), look)
        by_step.set(title="Held-out loss over training", xlabel="step", ylabel="loss (nats a token asked for)")
        by_step.set_ylim(_trained_range(results))
        by_position.set(title="Loss by position, after training", xlabel="position in the context (tokens)")
        chunk_tokens = study.arms[0].config.model.chunk_tokens
        by_position.axvline(chunk_tokens, color="#999999", linewidth=0.8, linestyle=":")
        by_position.annotate(
            " end of the first chunk", (chunk_tokens, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top"
        )
        retains = found.far is not None or found.clear
        what = "Far gain retained" if found.far else "Gain retained" if found.clear else "Loss"
        unit = "% of the context gain" if retains else "loss (nats a token asked for)"
        by_bytes.set(title=f"{what} against bytes", ylabel=unit, xlabel="bytes a token in the mean layer")
        scale_bytes(by_bytes, [sent for line in found.lines if (sent := line.traffic.mean_layer_bytes) > 0])
        handles, labels = by_step.get_legend_handles_labels()
        columns = min(4, len(labels))
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=columns,
            title=_note(found),
            title_fontsize=9,
            alignment="left",
        )
        figure.suptitle(study.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        return save_png(figure, path)


def _note(found: Figures) -> str:
    note = "One seed."
    if found.seeds > 1:
        note = f"Means over {found.seeds} seeds; bands and bars: ± one standard deviation."
    if found.far:
        note += " Bars in the last panel: 95 % intervals."
    leaks = any(line.leaks for line in found.lines)
    return f"{note} An arm that leaks is left out of the last panel." if leaks else note


def _draw_spread(axes: Axes, x: Values, values: Values, look: Look, label: str) -> None:
    """`values` is [seeds, places]."""
    mean = values.mean(0)
    axes.plot(
        x, mean, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4, linewidth=1.6, label=label
    )
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=look.colour, alpha=0.15, linewidth=0)


def _curve(axes: Axes, arm: str, results: Sequence[Result], look: Look) -> None:
    steps = np.array([entry["step"] for entry in results[0]["curve"]])
    losses = np.array([[entry["heldout_loss"] for entry in result["curve"]] for result in results])
    _draw_spread(axes, steps, losses, look, arm)


def _trained_range(results: Results) -> tuple[float, float] | None:
    """The axis of losses, without those of the untrained model, beside which no difference could be seen."""
    runs = [result for arm_results in results.values() for result in arm_results]
    losses = [entry["heldout_loss"] for result in runs for entry in result["curve"][1:]]
    if not losses:
        return None
    margin = 0.05 * (max(losses) - min(losses)) + 1e-3
    return min(losses) - margin, max(losses) + margin


def _positions(study: Study, results: Sequence[Result]) -> tuple[Values, Values]:
    """Where nothing is asked for, no line is drawn."""
    total = np.array([result["position_loss_sum"] for result in results])
    count = np.array([result["position_tokens"] for result in results])
    width = study.arms[0].config.model.context / total.shape[1]
    losses = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return (np.arange(total.shape[1]) + 0.5) * width, losses


class _Point(NamedTuple):
    """What an arm reaches with the bytes that it sends, and how far the bar goes to both sides."""

    sent_bytes: float
    mean: float
    bar: Values | None


def _point(found: Figures, line: Line) -> _Point | None:
    """An arm that leaks has none, since its loss is no evidence."""
    if line.leaks:
        return None
    sent_bytes = line.traffic.mean_layer_bytes
    if found.far is not None:
        kept = found.far.lines[line.arm].far
        bar = 100 * np.array([[kept.mean - kept.low], [kept.high - kept.mean]]).clip(0)
        return _Point(sent_bytes, 100 * kept.mean, bar)
    spread = line.retained if found.clear and line.retained is not None else line.loss
    scale = 100 if found.clear else 1
    std = None if np.isnan(spread.std) else np.array([scale * spread.std])
    return _Point(sent_bytes, scale * spread.mean, std)


def _draw_point(axes: Axes, point: _Point | None, look: Look) -> None:
    """A line across for an arm that sends nothing."""
    if point is None:
        return
    if point.sent_bytes == 0:
        axes.axhline(point.mean, color=look.colour, linestyle=look.dashes, linewidth=1.2)
        return
    axes.errorbar(point.sent_bytes, point.mean, point.bar, color=look.colour, marker=look.marker, markersize=5.5)


def scale_bytes(axes: Axes, sent_bytes: Sequence[float]) -> None:
    """A logarithmic axis with room on both sides, and ticks at 1, 2 and 5 times powers of ten, or at powers alone."""
    low, high = min(sent_bytes) / 1.5, max(sent_bytes) * 1.5
    digits = (1, 2, 5) if high < 200 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-3, 10) for digit in digits]
    axes.set(xscale="log", xlim=(low, high))
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
