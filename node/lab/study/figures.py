"""The figures of a study: means and standard deviations over seeds, context gain, bytes.

The context gain G = loss(local-only) − loss(dense), taken seed by seed, is the worth of seeing the whole context. An
arm retains (loss(local-only) − loss(arm)) / G of it. That is given only where G exceeds three of its standard
deviations over seeds: below that, a lossless arm and a worthless one cannot be told apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node.lab.study.far import FarFigures, far_figures
from node.lab.study.table import DENSE, LOCAL, Study

CLEAR = 3.0
"""Standard deviations by which a context gain must exceed zero."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n − 1) over seeds; `std` is NaN for a single seed."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of one token (`measure.payload_bytes`), while compression is on: in the mean compressed layer, if
    there is one, and in the mean layer. Savings are relative to uncompressed K and V: in compressed layers, in all
    layers, and in all layers over all steps of the training, uncompressed ones included.
    """

    compressed_bytes: float | None
    mean_layer_bytes: float
    compressed_saving: float | None
    all_saving: float
    run_saving: float
    returned_bytes: float
    """Of the gradient that a reader sends back, in the mean layer."""
    both_saving: float
    """In all layers, payloads and their gradients together."""


@dataclass(frozen=True)
class Line:
    """One arm of the table."""

    arm: str
    loss: Spread
    gap: Spread
    """Loss above the dense arm's, seed by seed."""
    retained: Spread | None
    traffic: Traffic
    leaks: bool
    """True where tokens see later ones of their own chunk, so that the loss is no evidence."""


@dataclass(frozen=True)
class Figures:
    """A study's table."""

    seeds: int
    gain: Spread
    clear: bool
    lines: tuple[Line, ...]
    far: FarFigures | None = None
    """With intervals, where the runs were scored by document."""


def figures(study: Study, results: Mapping[str, Sequence[Result]]) -> Figures:
    """The table from the results by arm, seed by seed in the same order."""
    losses = {arm: [float(result["heldout_loss"]) for result in of_arm] for arm, of_arm in results.items()}
    gains = _differences(losses[LOCAL], losses[DENSE])
    gain = Spread.of(gains)
    clear = gain.mean > CLEAR * gain.std  # NaN, of a single seed, is never below
    lines = []
    for arm in study.arms:
        kept = _differences(losses[LOCAL], losses[arm.name])
        lines.append(
            Line(
                arm.name,
                Spread.of(losses[arm.name]),
                Spread.of(_differences(losses[arm.name], losses[DENSE])),
                Spread.of([part / whole for part, whole in zip(kept, gains, strict=True)]) if clear else None,
                traffic(results[arm.name]),
                arm.config.leaks and not arm.config.compress.is_unplugged_at(arm.config.train.steps),
            )
        )
    scored = all("documents" in result for of_arm in results.values() for result in of_arm)
    far = far_figures(results, DENSE, LOCAL) if scored else None
    return Figures(len(gains), gain, clear, tuple(lines), far)


def traffic(results: Sequence[Result]) -> Traffic:
    """The traffic of one arm; the mean over seeds, since ranks that follow a budget differ among them."""
    mean = {key: statistics.fmean(result["bytes"][key] for result in results) for key in results[0]["bytes"]}
    saving = {key: 1.0 - mean[key] / mean["plain"] for key in ("compressed", "layer", "trained")}
    returned = mean.get("returned", mean["layer"])
    narrow = mean["compressed"] > 0
    return Traffic(
        compressed_bytes=mean["compressed"] if narrow else None,
        mean_layer_bytes=mean["layer"],
        compressed_saving=saving["compressed"] if narrow else None,
        all_saving=saving["layer"],
        run_saving=saving["trained"],
        returned_bytes=returned,
        both_saving=1.0 - (mean["layer"] + returned) / (2 * mean["plain"]),
    )


def _differences(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(above, below, strict=True)]
