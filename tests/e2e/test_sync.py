"""Averaging weights every 20 steps (c = 20) against averaging gradients in every step (c = 1), on the tiny config.

"Loses nothing beyond seed noise" is taken at its word: over three seeds each, the mean held-out loss at c = 20 is not
above that at c = 1 by more than two standard errors of the difference of the means.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from swarm import isthmus, records

SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sparse_averaging_loses_nothing_beyond_seed_noise(tmp_path: Path, cache: Path) -> None:
    losses: dict[int, list[float]] = {1: [], 20: []}
    for seed in SEEDS:
        for every, found in losses.items():
            name = f"c{every}-seed{seed}"
            settings = ["--train.sync_every", str(every), "--run.seed", str(seed), "--run.name", name]
            settings += ["--train.eval_batches", "64", "--net.profile", "unshaped", "--run.outputs", str(tmp_path)]
            done = isthmus(cache, "run", "configs/tiny.toml", *settings, timeout_s=240.0)
            assert done.returncode == 0, done.stderr
            found.append(records(tmp_path / name)[-1]["heldout_loss"])
    means = {every: statistics.mean(found) for every, found in losses.items()}
    error = math.sqrt(sum(statistics.variance(found) / len(found) for found in losses.values()))
    print(f"held-out loss over seeds {SEEDS}: {losses}")
    print(f"c = 20: {means[20]:.4f}, c = 1: {means[1]:.4f}, difference {means[20] - means[1]:+.4f} ± {error:.4f}")
    assert means[20] - means[1] <= 2 * error
