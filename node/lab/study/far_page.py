"""The part of a study's page that has intervals: far context by class, arm by arm (`node.lab.study.far`)."""

from __future__ import annotations

from netem.tables import markdown_table
from node.lab.study.far import BORDER, FAR_CLAIM, FarFigures, FarLine, Interval
from node.lab.study.figures import Figures, Traffic
from node.lab.study.table import DENSE, LOCAL


def far_gain(far: FarFigures) -> str:
    """What there is to retain."""
    return (
        f"Far gain G = loss({LOCAL}) − loss({DENSE}) over {far.targets} targets a seed, {BORDER} tokens and more into "
        f"chunks from the third on: **{interval_text(far.gain, '.3f')} nats**, {far.deviations:.0f} standard "
        f"deviations. Border gain, over the first {BORDER} tokens of the same chunks: "
        f"{interval_text(far.border_gain, '.3f')} nats."
    )


def far_table(found: Figures, far: FarFigures) -> str:
    """The table of all arms."""
    probe = any(line.by_distance for line in far.lines.values())
    head = [
        "arm",
        "far loss",
        "far gain retained",
        "by distance" if probe else "perplexity above dense",
        "border gain retained",
        "B/token in the mean layer",
        "B/token returned",
        "saved in all layers, both ways",
        f"≥ {FAR_CLAIM[0]:.0%} kept",
    ]
    rows = [_row(line.arm, far.lines[line.arm], line.traffic) for line in found.lines]
    return markdown_table(head, rows, align="lr")


def interval_text(value: Interval, form: str, scale: float = 1.0) -> str:
    """A figure and its interval in brackets."""
    return f"{scale * value.mean:{form}} [{scale * value.low:{form}}, {scale * value.high:{form}}]"


def _row(arm: str, line: FarLine, traffic: Traffic) -> list[str]:
    distances = ", ".join(f"{least}: {100 * value.mean:.1f}" for least, value in line.by_distance.items())
    row = [
        arm,
        interval_text(line.loss, ".3f"),
        f"{interval_text(line.far, '.1f', 100)} %",
        distances or f"{interval_text(line.perplexity, '+.2f', 100)} %",
        f"{interval_text(line.border, '.1f', 100)} %",
        f"{traffic.mean_layer_bytes:.1f}",
        f"{traffic.returned_bytes:.1f}",
        f"{traffic.both_saving:.1%}",
    ]
    claim, least = FAR_CLAIM
    return [*row, "yes" if line.far.low >= least and line.far.high >= claim else "no"]


FAR_LEGEND = (
    "Brackets hold 95 % intervals of a paired bootstrap over seeds × documents: the same ones are drawn for all arms. "
    f"Gain retained is (loss({LOCAL}) − loss(arm)) / (loss({LOCAL}) − loss({DENSE})). By distance: the far gain "
    "retained, in per cent, of what was copied from at least so many tokens back. Perplexity is over all held-out "
    "tokens; the probes, which ask for few of them, have none. Bytes are payload bytes of one token one way to one "
    "reader, by the formula that the wire is tested against; those returned are the gradients'. Savings are relative "
    f"to K and V, and their gradients, in bfloat16, in all layers. That {FAR_CLAIM[0]:.0%} are kept is said where the "
    f"interval begins at {FAR_CLAIM[1]:.0%} or more and reaches {FAR_CLAIM[0]:.0%}."
)
