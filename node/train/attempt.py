"""A step that is under way: its gradients are held until all nodes have theirs, and nothing of it counts before that.

The coordinator's next `Go` says that all nodes hold the step, and the optimizer takes it then; where averaged weights,
an evaluation or a checkpoint follow in the same step, a round of its own says so before them
(`node.train.schedule.TAKE`). A step that some node never came to hold is dropped by all: weights, moments and basis are
then as they were when it began, and it is done again in the next generation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from node.subspace.basis import Moments
from node.train.basis import RunningMoments
from node.train.finite import StepGuard
from node.train.optimizer import set_learning_rate

Metrics = dict[str, float]


class Attempt:
    """One try at a step. `number` is the number of steps that are done once it is taken."""

    def __init__(self, number: int, running: RunningMoments, guard: StepGuard) -> None:
        self.number = number
        self.held = False
        self.metrics: Metrics = {}
        self._running, self._total = running, running.total
        self._guard, self._skipped = guard, guard.skipped
        self._put_back: list[Callable[[], None]] = []
        self._lr = 0.0
        self._takes = False
        self._moments: Moments = {}

    def before_drop(self, put_back: Callable[[], None]) -> None:
        """Something changes already while the step is computed: `put_back` undoes that if the step is dropped."""
        self._put_back.append(put_back)

    def hold(self, takes: bool, lr: float, moments: Moments, metrics: Metrics) -> None:
        """The gradients are computed, and this node waits for the others. Without `takes` the step is skipped."""
        self.held = True
        self._takes, self._lr, self._moments, self.metrics = takes, lr, moments, metrics

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """All nodes hold the step: it counts from now on."""
        assert self.held
        set_learning_rate(optimizer, self._lr)
        if self._takes:
            optimizer.step()
            self._running.add(self._moments)

    def drop(self) -> None:
        """The step counts for nothing."""
        self._running.total = self._total
        self._guard.skipped = self._skipped
        for put_back in reversed(self._put_back):
            put_back()
