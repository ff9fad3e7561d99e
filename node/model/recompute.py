"""Activation checkpointing: what a piece of the forward would keep for its backward is forgotten, and computed again.

`Forgotten.saving` is a context: of every tensor that autograd wants to keep within it, only the number is kept. The
first of them that the backward asks for has the whole piece computed again. The graph remains that of the forward, so
that passes which take turns in the forward take turns in the backward too, and gradients are added in the same order.
(`torch.utils.checkpoint` works alike, but on a piece in one call, where a layer here is in two: others run in between.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Enough(Exception):
    """All that was forgotten is there again; the rest of the piece need not be computed."""


class Forgotten:
    """The tensors of one piece. `again` computes the piece anew: the same operations in the same order, from inputs
    that require gradients as those of the forward do. It is called at most once, in the backward."""

    def __init__(self, again: Callable[[], object], device_type: str) -> None:
        self._again: Callable[[], object] | None = again
        self._count = 0
        self._tensors: dict[int, Tensor] = {}
        self._device_type = device_type
        self._autocast = (torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))

    def saving(self) -> saved_tensors_hooks:
        """A context in which autograd's tensors are forgotten. The piece may be made in several of them."""
        return saved_tensors_hooks(self._forget, self._recall)

    def _forget(self, _: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def _recall(self, number: int) -> Tensor:
        if self._again is not None:
            self._compute(self._again)
            self._again = None
        return self._tensors.pop(number)

    def _compute(self, again: Callable[[], object]) -> None:
        dtype, enabled = self._autocast
        with (
            torch.enable_grad(),
            torch.autocast(self._device_type, dtype, enabled=enabled),
            saved_tensors_hooks(self._keep, _not_asked_for),
        ):
            try:
                again()
            except _Enough:
                return
        raise AssertionError(f"{len(self._tensors)} tensors came again of {self._count}")

    def _keep(self, tensor: Tensor) -> None:
        self._tensors[len(self._tensors)] = tensor.detach()
        if len(self._tensors) == self._count:
            raise _Enough


def _not_asked_for(_: None) -> Tensor:
    raise AssertionError("there is no backward through what is computed again")
