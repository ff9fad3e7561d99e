"""Steps and numbers that are not finite: they are refused before the optimizer, or a file, takes them.

A step is refused where the loss or a gradient is not finite. With `train.nonfinite = "stop"` the node that finds it
ends the run with the reason. With "skip" the step is left out, on all nodes or on none: where gradients are averaged, a
node with a fault makes its own NaN, and the average is NaN on every node; elsewhere the nodes agree in a round of one
number (`node.train.schedule.FINITE`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from netem.errors import RunAborted
from node.config import TrainConfig

log = logging.getLogger("isthmus.train")

MOST_SKIPPED = 10
"""Steps in a row that may be skipped: with weights that are beyond repair, every further step would be."""


class StepGuard:
    """Says of each step whether the optimizer may take it."""

    def __init__(self, train: TrainConfig) -> None:
        self._skips = train.nonfinite == "skip"
        self.skipped = 0
        """Steps in a row that were skipped, up to the last one."""

    def check_loss(self, step: int, loss: Tensor) -> None:
        """Raise `RunAborted` for a loss that is not finite, before it goes back through the model; not with "skip"."""
        if not self._skips and not torch.isfinite(loss):
            raise self._stopped(step, f"the loss is {loss.item()}")

    def fault(self, step: int, loss: Tensor, gradients: Mapping[str, Tensor]) -> str:
        """What is not finite on this node, in words; "" where all is. Raises `RunAborted` unless steps are skipped."""
        name = first_nonfinite(gradients)
        text = f"the gradient of {name} is not finite" if name else ""
        text = text if torch.isfinite(loss) else f"the loss is {loss.item()}"
        if text and not self._skips:
            raise self._stopped(step, text)
        return text

    def takes(self, step: int, fault: str, norm: Tensor, vote: Callable[[float], float] | None) -> bool:
        """Whether the optimizer takes this step, whose gradient has this `norm`.

        `vote` sums a number over all nodes; without it, all nodes have the same gradient. Raises `RunAborted` unless
        steps are skipped, or where too many are.
        """
        if not fault and not torch.isfinite(norm):
            fault = f"the norm of the gradient is {norm.item()}"
        if not (vote(float(bool(fault))) if vote else fault):
            self.skipped = 0
            return True
        reason = fault or "the loss or the gradient of another node is not finite"
        if not self._skips:
            raise self._stopped(step, reason)
        self.skipped += 1
        if self.skipped > MOST_SKIPPED:
            raise RunAborted(
                f"step {step}: {reason}, as in the {MOST_SKIPPED} steps before it, which were skipped; "
                "go on from a checkpoint with a lower train.lr"
            )
        log.warning("step %d is skipped: %s", step, reason)
        return False

    def _stopped(self, step: int, reason: str) -> RunAborted:
        return RunAborted(
            f"step {step}: {reason}; the step was not taken. Resume with a lower train.lr (where that does not help, "
            'from an earlier checkpoint: move the later ones away), or with train.nonfinite = "skip"'
        )


def poison(gradients: Sequence[Tensor]) -> None:
    """Make a gradient NaN, so that its average with others is NaN on every node."""
    gradients[0].fill_(torch.nan)


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with an entry that is not finite; "" where all are finite."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), "")


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise `RunAborted` where a tensor is not finite; `what` begins the message: "step 7: no checkpoint"."""
    if name := first_nonfinite(tensors):
        raise RunAborted(f"{what}: {name} is not finite; go on from an earlier checkpoint with a lower train.lr")


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all entries are; where a sum overflows, each entry is looked at.
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
