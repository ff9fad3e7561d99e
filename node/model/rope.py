"""Rotary position embedding (RoFormer, section 3.2), in the half-split layout of Llama checkpoints, with the scaling of
Llama 3.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from node.config.model import RopeScaling

UNSCALED = RopeScaling()


class Rope:
    """Turns queries and keys by their global positions.

    Angles are computed in float32 for all positions of a context: two [context, head_dim] tables for all layers.
    """

    def __init__(
        self, head_dim: int, context: int, theta: float, device: torch.device, scaling: RopeScaling = UNSCALED
    ) -> None:
        inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if scaling.factor != 1:
            inverse = _scaled(inverse, scaling)
        angles = torch.outer(torch.arange(context).float(), inverse)
        self._cos = torch.cat((angles, angles), -1).cos().to(device)
        self._sin = torch.cat((angles, angles), -1).sin().to(device)

    def __call__(self, x_nHD: Tensor, positions_n: Tensor) -> Tensor:
        """Rotate x [..., n, H, D] whose tokens stand at `positions` [n], or [..., n] with leading dimensions of x."""
        cos = self._cos[positions_n].unsqueeze(-2).to(x_nHD.dtype)
        sin = self._sin[positions_n].unsqueeze(-2).to(x_nHD.dtype)
        first, second = x_nHD.chunk(2, dim=-1)
        return x_nHD * cos + torch.cat((-second, first), -1) * sin


def _scaled(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequencies: slow ones divided by the factor, fast ones as they are, in between a mixture.

    The order of operations is that of `transformers`, so that the results are equal to the bit.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    slow, fast = wavelength > scaling.original_context / low, wavelength < scaling.original_context / high
    stretched = torch.where(slow, inverse / scaling.factor, inverse)
    share = (scaling.original_context / wavelength - low) / (high - low)
    between = (1 - share) * stretched / scaling.factor + share * stretched
    return torch.where(slow | fast, stretched, between)
