"""Numbers that a peer has sent, judged before anything is computed from them.

A peer that diverges, has a faulty GPU or lies sends numbers that are not finite, or larger than any in training. They
would spread to every node within a step, and nobody could say any more where they came from. So they are found where
they arrive, and the peer is named.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOST_PAYLOAD = 1e8
"""The largest number in keys, values, rotation parameters and their gradients. In training they are below 1e4."""

MOST_SHARD = 1e16
"""The largest number in an averaging round. The largest there are second moments: squares, summed over many tokens."""


def objection(tensors: Iterable[Tensor], most: float) -> str:
    """What is wrong with numbers that have arrived, in words; "" where nothing is. Whole numbers are always right."""
    for tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch finds no extremes in float8
        largest = max(abs(float(bound)) for bound in torch.aminmax(wide))
        if not largest <= most:  # also where it is NaN
            return "not finite" if not torch.isfinite(wide).all() else f"as large as {largest:.1e}"
    return ""
