"""The picture of a run, or of several together, drawn from what they have written (`node.watch.recorded`).

It draws a run that has ended or one that still goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from coordinator.records import rates
from coordinator.records.folder import REPORT
from coordinator.records.rates import Record, number
from netem.errors import ConfigError
from node.watch.recorded import RunRecords, caption, read_run, speed
from node.watch.style import BLUE, GREEN, ORANGE, RUN_LOOKS, VERMILION, save_png, styled_figure

# What the bytes on the wire are for: a label, the key in the records (None: all that is left), a colour.
USES = (
    ("compressed layers", "compressed_bytes", BLUE),
    ("uncompressed layers", "dense_bytes", ORANGE),
    ("averaging", "averaging_bytes", GREEN),
    ("evaluation, headers, acknowledgements", None, "#BBBBBB"),
)
MOST_NODES = 8
TRAFFIC_POINTS = 80


def draw_report(run_folder: Path) -> Path:
    """Draw one run into its folder and return the PNG's path. Raises `ConfigError` where there is nothing to draw."""
    run = read_run(run_folder)
    names = _busiest(run.records)
    rows = math.ceil(len(names) / 4)
    with styled_figure(10, 5.2 + 1.9 * rows) as figure:
        panels: Any = figure.subfigures(2, 1, height_ratios=(3.2, 0.6 + 1.9 * rows))
        top, bottom = panels
        by_step, by_time = top.subplots(1, 2, sharey=True)
        _draw_losses(by_step, by_time, [run])
        by_step.legend(loc="upper right")
        _draw_traffic(bottom, run, names)
        figure.suptitle(run.name, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(caption(run), x=0.01, ha="left", fontsize=9, color="#444444", linespacing=1.5)
        return save_png(figure, run_folder / REPORT)


def draw_comparison(run_folders: Sequence[Path], path: Path) -> Path:
    """Draw several runs over each other into the PNG `path`, and return it. Raises `ConfigError` as `draw_report`."""
    runs = [read_run(folder) for folder in run_folders]
    if not runs:
        raise ConfigError("report: no run to draw; give at least one folder, such as outputs/demo")
    with styled_figure(10, 3.9 + 0.2 * len(runs)) as figure:
        by_time, by_step, throughput = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.75))
        by_step.sharey(by_time)
        _draw_losses(by_step, by_time, runs)
        by_time.set_ylabel("loss (nats per token)")
        by_step.set_ylabel("")
        by_step.tick_params(labelleft=False)
        _draw_throughput(throughput, runs)
        handles, labels = by_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), fontsize=10)
        figure.supxlabel(_networks(runs), x=0.01, ha="left", fontsize=9, color="#444444", linespacing=1.5)
        return save_png(figure, path)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over up to `width` neighbours, fewer at both ends and evenly on both sides, so that nothing is shifted."""
    half = width // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        near = values[index - reach : index + reach + 1]
        means.append(math.fsum(near) / len(near))
    return means


def _networks(runs: Sequence[RunRecords]) -> str:
    """What is drawn, and one line for each network with the runs that were on it."""
    by_network: dict[str, list[str]] = {}
    for run in runs:
        by_network.setdefault(run.network, []).append(run.name)
    lines = [f"{', '.join(names)}: {network}" for network, names in by_network.items()]
    return "\n".join(["Lines: training loss, smoothed. Dots: held-out loss.", *lines])


def _draw_losses(by_step: Axes, by_time: Axes, runs: Sequence[RunRecords]) -> None:
    """The same curves twice: over steps and over wall-clock. A single run names its curves, several their runs."""
    unit, unit_s = _time_unit(max(run.elapsed_s[-1] for run in runs))
    alone = len(runs) == 1
    for run, (colour, dashes) in zip(runs, itertools.cycle(RUN_LOOKS), strict=False):
        records = run.records
        positions = [[number(r, "step") for r in records], [elapsed_s / unit_s for elapsed_s in run.elapsed_s]]
        trained = [i for i, r in enumerate(records) if isinstance(r.get("loss"), int | float)]
        heldout = [i for i, r in enumerate(records) if isinstance(r.get("heldout_loss"), int | float)]
        losses = [number(records[i], "loss") for i in trained]
        means = smooth(losses, max(1, len(losses) // 25))
        for axes, position in zip((by_step, by_time), positions, strict=True):
            x = [position[i] for i in trained]
            if alone:
                axes.plot(x, losses, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(x, means, color=colour, linestyle=dashes, linewidth=1.8, label="train" if alone else run.name)
            axes.plot(
                [position[i] for i in heldout],
                [number(records[i], "heldout_loss") for i in heldout],
                linestyle="none",
                marker="o",
                markersize=5.5 if alone else 4.5,
                markerfacecolor=VERMILION if alone else colour,
                markeredgecolor="white",
                label="held-out" if alone else None,
                zorder=3,
            )
    by_step.set(title="Loss over steps", xlabel="step", ylabel="loss (nats per token)")
    by_time.set(title="Loss over wall-clock", xlabel=f"wall-clock ({unit})")
    for axes in (by_step, by_time):
        axes.set_xlim(left=0)


def _draw_traffic(panel: Any, run: RunRecords, names: Sequence[str]) -> None:
    """One small picture a node: Mbit/s on the wire over wall-clock, stacked by use."""
    if not names:
        return
    unit, unit_s = _time_unit(run.elapsed_s[-1])
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    grid = panel.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        times_s, series = _traffic(run, names[place])
        x = [time_s / unit_s for time_s in times_s]
        axes.stackplot(x, series, labels=[label for label, *_ in USES], colors=[use[2] for use in USES], step="post")
        axes.set_title(names[place], fontsize=9.5, fontweight="normal")
        axes.set_xlim(0, run.elapsed_s[-1] / unit_s)
        axes.set_ylim(bottom=0)
        if place % columns == 0:
            axes.set_ylabel("Mbit/s sent")
        if place + columns >= len(names):
            axes.set_xlabel(f"wall-clock ({unit})")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    panel.legend(handles, labels, loc="outside upper right", ncols=4, columnspacing=1.2, handlelength=1.1)
    count = len(rates.node_names(run.records))
    which = f", the {len(names)} busiest of {count} nodes" if count > len(names) else ""
    panel.suptitle(f"Traffic by use{which}", x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def _traffic(run: RunRecords, name: str) -> tuple[list[float], list[list[float]]]:
    """Mbit/s by use (`USES`) over spans of at least 1/80 of the run: the spans' ends in seconds, from 0 on, and a
    value for each, the first one repeated, as steps are drawn."""
    least_s = run.elapsed_s[-1] / TRAFFIC_POINTS
    ends_s, columns, sums, began_s = [0.0], [[0.0] * len(USES)], [0.0] * len(USES), 0.0
    for index, (record, end_s) in enumerate(zip(run.records, run.elapsed_s, strict=True)):
        values = rates.nodes_of(record).get(name, {})
        known = [number(values, key) for _, key, _ in USES if key is not None]
        known.append(max(0.0, number(values, "sent_wire_bytes") - sum(known)))
        sums = [before + more for before, more in zip(sums, known, strict=True)]
        span_s = end_s - began_s
        if span_s > 0 and (span_s >= least_s or index == len(run.records) - 1):
            columns[-1] = [8e-6 * nbytes / span_s for nbytes in sums]
            columns.append(columns[-1])
            ends_s.append(end_s)
            sums, began_s = [0.0] * len(USES), end_s
    return ends_s, [list(series) for series in zip(*columns, strict=True)]


def _draw_throughput(axes: Axes, runs: Sequence[RunRecords]) -> None:
    values = [rates.tokens_per_s(rates.full_context(run.records)) or 0.0 for run in runs]
    places = list(range(len(runs)))
    axes.barh(places, values, height=0.6, color=[RUN_LOOKS[place % len(RUN_LOOKS)][0] for place in places])
    for place, (run, value) in enumerate(zip(runs, values, strict=True)):
        axes.annotate(speed(value, run), (value, place), (4, 0), textcoords="offset points", va="center")
        axes.annotate(run.name, (0, place - 0.34), (1, 1), textcoords="offset points", va="bottom", fontsize=9)
    axes.set(title="Tokens/s at full context", xlim=(0, max(values) * 1.28 or 1), ylim=(len(runs) - 0.5, -0.75))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def _busiest(records: Sequence[Record]) -> list[str]:
    names = rates.node_names(records)
    chosen = sorted(names, key=lambda name: -rates.total(records, "sent_wire_bytes", name))[:MOST_NODES]
    return [name for name in names if name in chosen]


def _time_unit(longest_s: float) -> tuple[str, float]:
    if longest_s < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest_s < 3 * 3600 else ("hours", 3600.0)
