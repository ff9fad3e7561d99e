"""How much of far context an arm keeps, and how sure a study is of it.

Held-out losses are summed by class, for each document, a run of consecutive held-out contexts (`scores`):
  far     targets that are asked for, in chunks from the third on, `BORDER` tokens and more into their chunk;
  border  the same, less than `BORDER` tokens into their chunk, where the nearest neighbours are in the chunk before;
  text    all targets, asked for or not: what perplexity is taken from;
  128, …  those of `far` that the probe of copies took from at least so far back.

The gain G of a class is loss(local-only) − loss(dense), and an arm retains (loss(local-only) − loss(arm)) / G of it.
Intervals are from a paired bootstrap: seeds and documents are drawn with replacement, the same ones for all arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FAR, BORDER_CLASS, TEXT = "far", "border", "text"
BORDER = 16
"""Tokens of a chunk that count as its border."""
FIRST_CHUNK = 2
"""Chunks before this one have too little context behind them to be scored."""
DOCUMENTS = 64
"""Documents, at most, into which the held-out contexts are put."""
RESAMPLES = 4000
FAR_CLAIM = (0.99, 0.97)
"""What a page may claim to be kept, and where the interval has to begin for that."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, found: float, resampled: Values) -> Interval:
        low, high = np.quantile(resampled, (0.025, 0.975))
        return cls(found, float(low), float(high))


class Bootstrap:
    """Losses by arm and class, over all seeds and documents and over draws of them.

    The first of `RESAMPLES` + 1 weightings is the data as it is; in each other one, seeds and documents weigh as often
    as they were drawn.
    """

    def __init__(self, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._sums: dict[tuple[str, str], Values] = {
            (arm, name): np.array([run["documents"][name] for run in runs], dtype=np.float64)  # [seeds, documents, 2]
            for arm, runs in results.items()
            for name in runs[0]["documents"]
        }
        seeds, documents, _ = next(iter(self._sums.values())).shape
        draw = np.random.Generator(np.random.Philox(key=0))
        self._weights = (_weights(draw, seeds), _weights(draw, documents))

    def losses(self, arm: str, name: str) -> Values:
        """Nats a target of this class, by weighting: [RESAMPLES + 1]."""
        by_seed, by_document = self._weights
        total, count = np.einsum("ws,sdx,wd->xw", by_seed, self._sums[arm, name], by_document)
        losses: Values = total / np.maximum(count, 1e-9)
        return losses

    def classes(self) -> list[str]:
        """Every class that was scored."""
        return list(dict.fromkeys(name for _, name in self._sums))


def interval(values: Values) -> Interval:
    """From what `Bootstrap.losses` gives, or what is computed from it."""
    return Interval.of(float(values[0]), values[1:])


def _weights(draw: np.random.Generator, count: int) -> Values:
    drawn = draw.multinomial(count, [1 / count] * count, RESAMPLES).astype(np.float64)
    return np.vstack([np.ones((1, count)), drawn])


@dataclass(frozen=True)
class FarLine:
    """One arm of the table, with intervals. Gains retained are shares; `perplexity` is the arm's over all text, above
    that of the dense arm, as a share of it. `by_distance` has the far gain retained by the least distance."""

    loss: Interval
    far: Interval
    border: Interval
    perplexity: Interval
    by_distance: Mapping[str, Interval]


@dataclass(frozen=True)
class FarFigures:
    """What all arms have in common, and each arm's line."""

    gain: Interval
    border_gain: Interval
    deviations: float
    """The far gain over its standard deviation in the bootstrap."""
    targets: int
    """Targets of `far`, in one seed."""
    lines: Mapping[str, FarLine]


def far_figures(results: Mapping[str, Sequence[Mapping[str, Any]]], dense: str, local: str) -> FarFigures:
    """From the results by arm, seed by seed in the same order."""
    drawn = Bootstrap(results)
    gain = drawn.losses(local, FAR) - drawn.losses(dense, FAR)
    border_gain = drawn.losses(local, BORDER_CLASS) - drawn.losses(dense, BORDER_CLASS)
    distances = [name for name in drawn.classes() if name.isdecimal()]

    def retained(arm: str, name: str) -> Interval:
        whole = drawn.losses(local, name) - drawn.losses(dense, name)
        return interval((drawn.losses(local, name) - drawn.losses(arm, name)) / whole)

    lines = {
        arm: FarLine(
            interval(drawn.losses(arm, FAR)),
            retained(arm, FAR),
            retained(arm, BORDER_CLASS),
            interval(np.exp(drawn.losses(arm, TEXT) - drawn.losses(dense, TEXT)) - 1),
            {name: retained(arm, name) for name in distances},
        )
        for arm in results
    }
    count = int(sum(count for _, count in results[dense][0]["documents"][FAR]))
    noise = float(gain[1:].std())
    deviations = float(gain[0]) / noise if noise else math.inf
    return FarFigures(interval(gain), interval(border_gain), deviations, count, lines)
