"""The picture of figure2: loss over the target's clock and over steps, and tokens/s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from coordinator.records.rates import number
from node.lab.experiment.page import Curve
from node.watch.report import smooth
from node.watch.style import RUN_LOOKS, save_png, styled_figure

SMOOTHING = 20
"""The training loss is a mean over this part of the steps."""


def draw(curves: Sequence[Curve], path: Path) -> Path:
    """Draw into the PNG `path`. Raises `ConfigError` where it cannot be written."""
    with styled_figure(10, 4.2) as figure:
        by_time, by_step, throughput = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.8))
        by_step.sharey(by_time)
        unit, unit_s = _unit(max(curve.emulated_s[-1] for curve in curves))
        for curve, (colour, dashes) in zip(curves, RUN_LOOKS, strict=False):
            losses = smooth([number(record, "loss") for record in curve.records], len(curve.records) // SMOOTHING)
            steps = [number(record, "step") for record in curve.records]
            times = [time_s / unit_s for time_s in curve.emulated_s]
            heldout = [place for place, record in enumerate(curve.records) if "heldout_loss" in record]
            for axes, x in ((by_time, times), (by_step, steps)):
                axes.plot(x, losses, color=colour, linestyle=dashes, linewidth=1.6, label=curve.stage.arm.title)
                axes.plot(
                    [x[place] for place in heldout],
                    [number(curve.records[place], "heldout_loss") for place in heldout],
                    linestyle="none",
                    marker="o",
                    markersize=3.5,
                    color=colour,
                )
        by_time.set(title="Loss over wall-clock", xlabel=f"emulated {unit} (logarithmic)", xscale="log")
        by_time.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        by_time.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        by_time.xaxis.set_minor_locator(NullLocator())
        by_time.set_ylabel("loss (nats per token)")
        by_step.set(title="Loss over steps", xlabel="step")
        by_step.tick_params(labelleft=False)
        _bars(throughput, curves)
        handles, labels = by_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))
        figure.supxlabel(
            "Lines: training loss, smoothed. Dots: held-out loss. A small model in a wind tunnel; the target's clock.",
            x=0.01,
            ha="left",
            fontsize=9,
            color="#444444",
        )
        return save_png(figure, path)


def _bars(axes: Axes, curves: Sequence[Curve]) -> None:
    names = [curve.stage.arm.name for curve in curves][::-1]
    speeds = [curve.verdict.tokens_per_s for curve in curves][::-1]
    colours = [colour for (colour, _), _ in zip(RUN_LOOKS, curves, strict=False)][::-1]
    bars = axes.barh(names, speeds, color=colours)
    axes.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=8)
    axes.set(title="Tokens/s of the target")
    axes.margins(x=0.25)


def _unit(longest_s: float) -> tuple[str, float]:
    return ("hours", 3600.0) if longest_s > 7200 else ("minutes", 60.0)
