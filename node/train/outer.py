"""The outer step: what the nodes' mean change does to the weights that they agree on, at each averaging (c > 1).

With `train.outer_lr = 1` and no momentum the agreed weights become the mean of the nodes' own: plain averaging. DiLoCo
(Douillard et al. 2023, arXiv 2311.08105; outer lr 0.7, momentum 0.9) takes the mean change as a gradient, for
Nesterov's momentum as `torch.optim.SGD` has it: v ← μ v + Δ, W₀ ← W₀ + lr (Δ + μ v).

Every node takes this step itself, on equal bits, once the round has been committed (`node.train.averaging`); nothing
more is sent. The weights' digest at the next barrier proves that all nodes have the same result.
"""

from __future__ import annotations

from torch import Tensor

from node.config import TrainConfig


class OuterStep:
    """One momentum for all weights, as flat as they are averaged. It is None until it is needed.

    Where weights are averaged in fragments, each one takes its part of the momentum when its turn comes.
    """

    def __init__(self, train: TrainConfig) -> None:
        self.velocity: Tensor | None = None
        self._lr = train.outer_lr
        self._momentum = train.outer_momentum

    @property
    def has_momentum(self) -> bool:
        """Whether the next step depends on earlier ones, so that a checkpoint must hold the momentum."""
        return self._momentum > 0.0

    def __call__(self, change: Tensor, elements: int, part: slice) -> Tensor:
        """What to add to the agreed weights `part` of all `elements`, for this mean change of the nodes' weights there,
        in float32."""
        # Each product and each sum is rounded by itself: a fused multiply-add, which not every machine has, would
        # give other bits.
        if self.has_momentum:
            if self.velocity is None:
                self.velocity = change.new_zeros(elements)
            velocity = self.velocity[part].mul_(self._momentum).add_(change)
            change = change + velocity * self._momentum
        return change if self._lr == 1.0 else change * self._lr
