"""Far context: which targets are scored, and intervals that are right where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from node.config import ModelConfig
from node.data.recall import Recall
from node.lab.study.far import BORDER, FAR, TEXT, far_figures
from node.lab.study.scores import far_scores

MODEL = ModelConfig(context=256, chunks=8)


def test_far_targets_are_deep_in_chunks_from_the_third_on() -> None:
    losses = torch.zeros(4, 256, dtype=torch.float64)
    losses[:, 64 + BORDER] = 1.0  # the first far target of the third chunk
    losses[:, 64 + BORDER - 1] = 10.0  # the last one of its border
    losses[:, 63] = 100.0  # in the second chunk
    asked = torch.ones(4, 256, dtype=torch.bool)
    asked[:, 255] = False
    found = far_scores(MODEL, Recall(), losses, asked)
    assert found[FAR] == [[1.0, 6 * (32 - BORDER) - 1]] * 4
    assert found["border"] == [[10.0, 6 * BORDER]] * 4
    assert found[TEXT] == [[111.0, 256]] * 4


def runs(level: float, noise: float, seeds: int = 4, documents: int = 32) -> list[dict[str, object]]:
    """Runs whose documents differ as much as documents do, in the same way for every arm, and by noise beside."""
    hard = np.random.Generator(np.random.Philox(1)).normal(size=documents)
    draw = np.random.Generator(np.random.Philox(int(1000 * level)))
    found: list[dict[str, object]] = []
    for _ in range(seeds):
        losses = level + hard + noise * draw.normal(size=documents)
        sums = [[100 * loss, 100] for loss in losses]
        found.append({"documents": {FAR: sums, "border": sums, TEXT: sums}})
    return found


def test_an_arm_between_dense_and_local_retains_its_share() -> None:
    found = far_figures({"dense": runs(1.0, 0.0), "local": runs(3.0, 0.0), "arm": runs(1.5, 0.0)}, "dense", "local")
    assert found.gain.mean == pytest.approx(2.0)
    assert found.targets == 3200
    line = found.lines["arm"].far
    # The documents differ by far more than the arms, but by the same for all of them: the draw is paired.
    assert (line.low, line.mean, line.high) == pytest.approx((0.75, 0.75, 0.75))
    assert found.lines["arm"].perplexity.mean == pytest.approx(np.exp(0.5) - 1)


def test_noise_widens_the_interval_about_the_true_value() -> None:
    arms = {"dense": runs(1.0, 0.3), "local": runs(3.0, 0.3), "arm": runs(1.5, 0.3)}
    found = far_figures(arms, "dense", "local")
    line = found.lines["arm"].far
    assert line.low < 0.75 < line.high
    assert 0.01 < line.high - line.low < 0.2
    assert found.deviations > 20
