"""What the subspaces keep in a trained run: figures by layer, for K and for V, taken in passes without gradients.

`energy_kept` falls when a subspace goes stale, earlier than the loss shows it. `EnergyReport` watches one evaluation on
one node, over its own chunks; the recorder takes the mean over nodes. It sends nothing and changes nothing. (For a
learned subspace `energy_kept` says how near Z̃ is to Z, and may fall while the model improves: there Z̃ need not be Z.
Where attention stays within a document, all rows of a chunk count, also those that are not sent.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from node.subspace.basis import group_moments
from node.subspace.codec import Codec

_POWER_STEPS = 64


@dataclass
class _Sums:
    """Sums over all tokens seen, and every θ seen."""

    moments_DD: Tensor
    energy: float = 0.0
    lost: float = 0.0
    thetas: list[Tensor] = field(default_factory=list)
    clip: float = 0.0


class EnergyReport:
    """Gathers figures while a model runs (`node.model.key_value.Probe`), and gives them as metrics."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], _Sums] = {}

    def see(self, layer: int, kind: str, z_CBnK: Tensor, codec: Codec | None, payload: tuple[Tensor, ...]) -> None:
        """A layer's K or V of the own chunks and, where it compresses, the payload [C, B, …] made of it."""
        z = z_CBnK.detach().float()
        (moments_DD,) = group_moments(z, 1)
        sums = self._sums.setdefault((layer, kind), _Sums(torch.zeros_like(moments_DD)))
        sums.moments_DD += moments_DD
        if codec is None:
            return
        whole = tuple(tensor.detach().flatten(0, 1) for tensor in payload)
        found = codec.decode(whole, torch.float32).reshape(z.shape)
        sums.energy += float(z.square().sum())
        sums.lost += float((z - found).square().sum())
        sums.thetas += [theta.flatten() for theta in payload[1:]]
        sums.clip = codec.clip

    def metrics(self) -> dict[str, float]:
        """`layer0_k_stable_rank`: ‖Z‖²_F / ‖Z‖²₂, between 1 and d_kv. Where the layer compresses, `_energy_kept`: the
        share of ‖Z‖²_F in what the subspace gives back, 1 − ‖Z − Z̃‖² / ‖Z‖², at the θ used; and where there is a θ, its
        mean and standard deviation (radians, or what the generator's norm makes of them) and `_theta_clip_share`, the
        share of all θ that lie at ±clip, from where no gradient leads back.
        """
        found: dict[str, float] = {}
        for (layer, kind), sums in sorted(self._sums.items()):
            name = f"layer{layer}_{kind}"
            found[f"{name}_stable_rank"] = stable_rank(sums.moments_DD)
            if sums.energy > 0:
                found[f"{name}_energy_kept"] = 1.0 - sums.lost / sums.energy
            if sums.thetas:
                theta = torch.cat(sums.thetas).double()
                found[f"{name}_theta_mean"] = float(theta.mean())
                found[f"{name}_theta_std"] = float(theta.std(correction=0))
                found[f"{name}_theta_clip_share"] = float((theta.abs() >= sums.clip * (1 - 1e-6)).double().mean())
        return found


def stable_rank(moments_DD: Tensor) -> float:
    """‖Z‖²_F / ‖Z‖²₂ from the second moments ZᵀZ: trace over the largest eigenvalue, found by power iteration (an
    eigensolver would take noticeable time at a width of thousands). Where the two largest eigenvalues are close, the
    result lies between them."""
    moments = moments_DD.double()
    total = float(moments.trace())
    if not (total > 0 and math.isfinite(total)):
        return 0.0
    vector = moments[:, moments.square().sum(0).argmax()]  # this start is not orthogonal to the leading eigenvector
    for _ in range(_POWER_STEPS):
        vector = moments @ (vector / vector.norm())
    return total / float(vector.norm())
