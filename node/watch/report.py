"""The picture of a run, or of several together, drawn from what they have written: metrics.jsonl and config.toml.

It draws a run that has ended or one that still goes on. Where a resumed run did steps again, the later ones count, and
the pause between is left out of its wall-clock. matplotlib is imported here only, without its global state (pyplot).
The figures in the captions are those of `coordinator.records.rates`; `coordinator.records.folder` names the files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from coordinator.records import rates
from coordinator.records.folder import CONFIG, METRICS, REPORT, whole_file
from coordinator.records.metrics import describe_steps, missing_steps, read_records, without_repeats
from coordinator.records.rates import Record, number
from netem.config import convert, load_toml
from netem.errors import ConfigError
from netem.profile import NetConfig, resolve_schedule
from netem.units import format_size
from node.watch.view import describe_network, format_duration

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#222222"
# Runs differ in more than colour: where curves coincide, a dashed one lets the one below be seen.
RUN_LOOKS: tuple[tuple[str, Any], ...] = tuple(
    zip(
        (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK),
        itertools.cycle(("-", (0, (4, 1.6)), (0, (1.3, 1.1)))),
        strict=False,
    )
)
# What the bytes on the wire are for: a label, the key in the records (None: all that is left), a colour.
USES = (
    ("compressed layers", "compressed_bytes", BLUE),
    ("uncompressed layers", "dense_bytes", ORANGE),
    ("averaging", "averaging_bytes", GREEN),
    ("evaluation, headers, acknowledgements", None, "#BBBBBB"),
)
# Where the time of steps went: a label and the key in the records.
TIMES = (
    ("compute", "compute_s"),
    ("exposed communication forward", "exposed_forward_s"),
    ("backward", "exposed_backward_s"),
    ("averaging", "averaging_s"),
    ("checkpoints", "checkpoint_s"),
    ("barrier", "barrier_s"),
)
MOST_NODES = 8
MOST_CHANGES = 4
TRAFFIC_POINTS = 80
DPI = 200
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "lines.scale_dashes": True,
}


@dataclass(frozen=True)
class RunRecords:
    """One run as it is drawn. `elapsed_s` is the wall-clock at the end of each record's step, without pauses."""

    name: str
    records: list[Record]
    elapsed_s: list[float]
    network: str
    mode: str
    dilation: float
    """Wall-clock seconds in one second of the emulated network (`netem.network`)."""


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


def read_run(folder: Path) -> RunRecords:
    """Read a run's files. Raises `ConfigError` where there is no run, or none of its steps is recorded yet."""
    path = folder / METRICS
    records: list[Record] = [*without_repeats(read_records(path))]
    if not any(isinstance(record.get("loss"), int | float) for record in records):
        raise ConfigError(f"{path}: holds no step with a loss; there is nothing to draw yet")
    elapsed_s = list(itertools.accumulate(rates.durations_s(records)))
    tree = _config_tree(folder / CONFIG)
    # A run that let tokens know of later ones says so wherever it is named: its losses do not compare.
    mark = " (leaks)" if any(number(record, "leaks") for record in records) else ""
    mark += " (untrusted)" if rates.untrusted(records) else ""
    return RunRecords(folder.resolve().name + mark, records, elapsed_s, _network(tree), _mode(tree), _dilation(tree))


def caption(run: RunRecords) -> str:
    """The run in a few lines: steps, bytes, waiting, the network, and whether the emulated network kept its rates."""
    records = run.records
    steps, nodes = int(number(records[-1], "step")), rates.node_names(records)
    done = f"{steps} steps, {rates.total(records, 'tokens'):,.0f} tokens in {format_duration(run.elapsed_s[-1])}"
    tokens_per_s = rates.tokens_per_s(rates.full_context(records)) or 0.0
    parts = [done, f"{_speed(tokens_per_s, run)} tokens/s at full context"]
    if run.dilation != 1:
        parts[0] += f" (emulated: {run.elapsed_s[-1] / run.dilation:,.1f} s)"
    if nodes:
        each = rates.total(records, "sent_wire_bytes") / len(nodes)
        parts.append(f"{format_size(each)} sent per node ({len(nodes)} nodes)")
    saved, more = rates.compression(records), []
    if saved is not None and saved.compressed_layers is not None:
        more.append(
            f"payload bytes saved by compression: {saved.compressed_layers:.1%} in compressed layers, "
            f"{saved.all_layers:.1%} over all layers, {rates.saved_in_all_steps(records) or 0:.1%} over all steps"
        )
    if skipped := rates.skipped_steps(records):
        more.append(f"steps skipped, not finite: {skipped}")
    if gaps := missing_steps(records, steps):
        more.append(f"steps without a record: {describe_steps(gaps)}")
    how = f"mode {run.mode}, network {run.network}" if run.mode else f"network {run.network}"
    lines = [" · ".join(parts), " · ".join(more), _times(records), how, _network_changes(records)]
    return "\n".join(line for line in [*lines, rates.untrusted(records)] if line)


def _times(records: Sequence[Record]) -> str:
    """Where the nodes' time went, evaluations left out, and on a line of its own what else they measured."""
    shares = [(label, rates.time_share(records, key)) for label, key in TIMES]
    shown = ", ".join(f"{label} {share:.1%}" for label, share in shares if share)
    spent = f"time of a step: {shown}" if shown else ""
    parts = []
    if longest := rates.exposed_layer(records):
        layer, way, share = longest
        parts.append(f"longest waits: layer {layer}, {way} ({share:.0%} of the exposed)")
    if mfus := [number(record, "mfu") for record in rates.full_context(records) if "mfu" in record]:
        parts.append(f"MFU {math.fsum(mfus) / len(mfus):.1%}")
    if peak_bytes := max(number(record, "memory_peak_bytes") for record in records):
        parts.append(f"memory at most {format_size(peak_bytes)} a node")
    return "\n".join(line for line in (spent, " · ".join(parts)) if line)


def _network_changes(records: Sequence[Record]) -> str:
    """The first few; all of them are in the records."""
    changes = rates.network_changes(records)
    shown = [f"step {change.step}: {change.text}" for change in changes[:MOST_CHANGES]]
    more = [f"{len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
    return f"network changed: {'; '.join(shown + more)}" if changes else ""


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over up to `width` neighbours, fewer at both ends and evenly on both sides, so that nothing is shifted."""
    half = width // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        near = values[index - reach : index + reach + 1]
        means.append(math.fsum(near) / len(near))
    return means


def _config_tree(path: Path) -> dict[str, Any]:
    """The run's config as it was written, by whatever version; empty where there is none."""
    return load_toml(path) if path.exists() else {}


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name, {})
    return section if isinstance(section, dict) else {}


def _mode(tree: dict[str, Any]) -> str:
    """What is sent, and in which steps it is not compressed."""
    compress = _section(tree, "compress")
    parts = [str(compress.get("mode", ""))]
    if parts == ["subspace"]:
        warmup_steps, unplug_step = compress.get("warmup_steps"), compress.get("unplug_step")
        parts += [f"warm start up to step {warmup_steps}"] if warmup_steps else []
        parts += [f"unplugged after step {unplug_step}"] if unplug_step else []
    return ", ".join(parts)


def _dilation(tree: dict[str, Any]) -> float:
    dilation = _section(tree, "net").get("dilation", 1.0)
    return float(dilation) if isinstance(dilation, int | float) and 0 < dilation < math.inf else 1.0


def _speed(tokens_per_s: float, run: RunRecords) -> str:
    """Of the wall clock, and where another is emulated, of that too."""
    text = f"{tokens_per_s:,.0f}"
    return text if run.dilation == 1 else f"{text} (emulated: {tokens_per_s * run.dilation:,.0f})"


def _network(tree: dict[str, Any]) -> str:
    if "net" not in tree:
        return "not recorded"
    try:
        return describe_network(resolve_schedule(convert(NetConfig, tree["net"], "net")))
    except ConfigError:  # the profile's own file may be gone by now
        return f"emulated {_section(tree, 'net').get('profile')}"


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
        axes.annotate(_speed(value, run), (value, place), (4, 0), textcoords="offset points", va="center")
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


@contextmanager
def styled_figure(width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure of so many inches in the house's style, which holds as long as the block."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG; a picture that is looked at is always whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return path
