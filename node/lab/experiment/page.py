"""The page of figure2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from coordinator.records.rates import Record, number
from netem.tables import markdown_table
from node.config import Config
from node.lab.experiment.arms import PASSES, ROUNDS
from node.lab.experiment.stage import Stage
from node.lab.plan.text import seconds
from node.lab.tunnel.check import TOLERANCE, Verdict
from node.lab.tunnel.page import shape_line

COMPRESSED_SHARE, UNCOMPRESSED_FACTOR = 0.95, 12.0
"""Targets: compressed over centralized and over uncompressed, in tokens/s."""
LAST_SHARE = 0.1
"""The training loss of the table is the mean over this share of the steps, the last ones."""


class Curve(NamedTuple):
    """One arm's run."""

    stage: Stage
    verdict: Verdict
    records: list[Record]
    emulated_s: list[float]
    """The target's clock at the end of each step."""
    load: float
    """The machine's load average when the run ended."""

    @property
    def tokens(self) -> float:
        return math.fsum(number(record, "tokens") for record in self.records)

    @property
    def last_loss(self) -> float:
        last = max(1, round(LAST_SHARE * len(self.records)))
        return fmean(number(record, "loss") for record in self.records[-last:])

    @property
    def heldout_loss(self) -> float:
        return next(number(record, "heldout_loss") for record in self.records[::-1] if "heldout_loss" in record)


class Facts(NamedTuple):
    """What stands at the head of the page."""

    command: str
    host: str
    date: str
    target: Config
    device: str
    picture: str
    """The path of the picture, as the page refers to it."""


def document(facts: Facts, curves: Sequence[Curve]) -> str:
    """The page, in Markdown."""
    small = curves[0].stage.small
    steps = len(curves[0].records)
    about = (
        f"Made by `{facts.command}` on {facts.date}, on {facts.host}. Each arm trains {shape_line(small)}, byte by "
        f"byte, on {small.coordinator.nodes} processes, for {steps} steps of "
        f"{small.model.context * small.train.batch:,} tokens in {PASSES} passes that take turns, one seed. All arms "
        f"have the same tokens at the same step. The network of each is emulated, and stands to its compute as "
        f"300 Mbit/s a link (100 Gbit/s a NIC, centralized) stand to {facts.target.run.name} on "
        f"{facts.target.coordinator.nodes} nodes, each {facts.device}. Times and tokens/s are those of that target, by "
        f"the ratio of compute: nothing runs on it."
    )
    sections = [
        "# Loss over wall-clock: compressed, uncompressed, centralized",
        about,
        f"![Loss over the emulated wall-clock and over steps, and tokens/s]({facts.picture})",
        _table(curves),
        "\n".join(f"- {line}" for line in [*_targets(curves), *_notes(curves)]),
    ]
    return "\n\n".join(sections) + "\n"


def _table(curves: Sequence[Curve]) -> str:
    best = {curve.stage.arm.name: curve.verdict.tokens_per_s for curve in curves}.get("centralized")
    rows = [
        [
            curve.stage.arm.title,
            seconds(curve.verdict.step_s),
            seconds(curve.verdict.target_step_s),
            f"{curve.verdict.tokens_per_s:,.0f}",
            "" if best is None else f"{curve.verdict.tokens_per_s / best:.2f}",
            f"{curve.last_loss:.3f}",
            f"{curve.heldout_loss:.3f}",
            f"{curve.tokens:,.0f}",
            _worst(curve.verdict),
            f"{curve.load:.1f}",
        ]
        for curve in curves
    ]
    head = ["arm", "step, wall clock", "target's clock", "tokens/s there", "× centralized", "train loss, last tenth"]
    head += ["held-out loss", "tokens", "farthest ratio", "load"]
    return markdown_table(head, rows, align="lrrrrrrrlr")


def _worst(verdict: Verdict) -> str:
    name = max(verdict.off, key=lambda key: abs(verdict.off[key]))
    mark = "" if verdict.held else ", missed"
    return f"{name} {verdict.off[name]:+.0%}{mark}"


def _targets(curves: Sequence[Curve]) -> list[str]:
    speed = {curve.stage.arm.name: curve.verdict.tokens_per_s for curve in curves}
    rows = []
    if {"compressed", "centralized"} <= speed.keys():
        ratio = speed["compressed"] / speed["centralized"]
        rows.append(f"compressed over centralized: {ratio:.2f} (target ≥ {COMPRESSED_SHARE}; {_said(ratio >= 0.95)})")
    if {"compressed", "uncompressed"} <= speed.keys():
        ratio = speed["compressed"] / speed["uncompressed"]
        said = _said(ratio >= UNCOMPRESSED_FACTOR)
        rows.append(f"compressed over uncompressed: {ratio:.1f} (target ≥ {UNCOMPRESSED_FACTOR:g}; {said})")
    return rows


def _said(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _notes(curves: Sequence[Curve]) -> list[str]:
    untrusted = [
        f"{curve.stage.arm.title}: {curve.verdict.measured.untrusted}"
        for curve in curves
        if curve.verdict.measured.untrusted
    ]
    return [
        "Farthest ratio: that of communication, latency or averaging to compute that is farthest from the target's; "
        f"more than {TOLERANCE:.0%}, or a network that this host could not emulate, counts as missed.",
        f"Weights are averaged {ROUNDS} times in a run, and once more where the compressed arm takes its basis. The "
        "clock counts averaging at the share that it has in the target, which averages every "
        f"{curves[0].stage.goal.config.train.sync_every} steps.",
        "The compressed arm's uncompressed first steps are on its clock at their full duration.",
        "Load: the machine's load average over one minute when the arm's run ended.",
        *untrusted,
    ]


def as_object(facts: Facts, curves: Sequence[Curve]) -> dict[str, Any]:
    """The figures of the page and of the picture."""
    return {
        "command": facts.command,
        "host": facts.host,
        "date": facts.date,
        "arms": {
            curve.stage.arm.name: {
                "tokens_per_s": curve.verdict.tokens_per_s,
                "step_s": curve.verdict.step_s,
                "target_step_s": curve.verdict.target_step_s,
                "off": curve.verdict.off,
                "held": curve.verdict.held,
                "untrusted": curve.verdict.measured.untrusted,
                "load": curve.load,
                "steps": [number(record, "step") for record in curve.records],
                "emulated_s": curve.emulated_s,
                "loss": [number(record, "loss") for record in curve.records],
                "heldout": [
                    [number(record, "step"), number(record, "heldout_loss")]
                    for record in curve.records
                    if "heldout_loss" in record
                ],
            }
            for curve in curves
        },
    }
