"""What a study draws, NAME.png: held-out loss over training, by position in the context, and against bytes sent.

Lines are means over seeds, bands reach from the least to the greatest. matplotlib is used as `node.watch.report` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from node.lab.study.figures import Result
from node.lab.study.table import Study
from node.watch.report import RUN_LOOKS, save_png, styled_figure

# Seven colours and three dashes, which go round at their own paces: 21 looks before one comes again.
COLOURS, DASHES = [colour for colour, _ in RUN_LOOKS], [dashes for _, dashes in RUN_LOOKS[:3]]

Values = npt.NDArray[np.float64]


def draw(study: Study, results: Mapping[str, Sequence[Result]], path: Path) -> Path:
    """Draw the study into the PNG `path`."""
    with styled_figure(13, 4.6 + 0.1 * len(results)) as figure:
        by_step, by_position, by_bytes = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
        for (arm, of_arm), colour, dashes in zip(results.items(), cycle(COLOURS), cycle(DASHES), strict=False):
            _line(by_step, *_curve(of_arm), arm, colour, dashes)
            _line(by_position, *_positions(study, of_arm), arm, colour, dashes)
            _mark(by_bytes, of_arm, arm, colour, dashes)
        by_step.set(title="Held-out loss over training", xlabel="step", ylabel="loss (nats a token asked for)")
        by_bytes.set(title="Loss against bytes", xlabel="bytes a token in the mean layer", xscale="log")
        by_bytes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        by_bytes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        by_bytes.xaxis.set_minor_formatter(NullFormatter())
        by_position.set(title="Loss by position, after training", xlabel="position in the context (tokens)")
        chunk_tokens = study.arms[0].config.model.chunk_tokens
        by_position.axvline(chunk_tokens, color="#999999", linewidth=0.8, linestyle=":")
        by_position.annotate(
            " end of the first chunk", (chunk_tokens, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top"
        )
        handles, labels = by_step.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(4, len(labels)))
        figure.suptitle(study.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        return save_png(figure, path)


def _line(axes: Axes, x: Values, values: Values, label: str, colour: str, dashes: object) -> None:
    """`values` is [seeds, places]."""
    axes.plot(x, values.mean(0), color=colour, linestyle=dashes, linewidth=1.6, label=label)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _mark(axes: Axes, results: Sequence[Result], arm: str, colour: str, dashes: object) -> None:
    """The loss at the bytes that the arm sends; a line over all bytes for an arm that sends none."""
    losses = [float(result["heldout_loss"]) for result in results]
    sent_bytes = np.mean([float(result["bytes"]["layer"]) for result in results])
    if sent_bytes == 0:
        axes.axhline(float(np.mean(losses)), color=colour, linestyle=dashes, linewidth=1.2)
        return
    spread = [[np.mean(losses) - min(losses)], [max(losses) - np.mean(losses)]]
    axes.errorbar(sent_bytes, np.mean(losses), spread, color=colour, marker="o", markersize=5, label=arm)


def _curve(results: Sequence[Result]) -> tuple[Values, Values]:
    steps = [entry["step"] for entry in results[0]["curve"]]
    return np.array(steps), np.array([[entry["heldout_loss"] for entry in result["curve"]] for result in results])


def _positions(study: Study, results: Sequence[Result]) -> tuple[Values, Values]:
    """Where nothing is asked for, no line is drawn."""
    total = np.array([result["position_loss_sum"] for result in results])
    count = np.array([result["position_tokens"] for result in results])
    width = study.arms[0].config.model.context / total.shape[1]
    losses = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return (np.arange(total.shape[1]) + 0.5) * width, losses
