"""Principal directions of K and V, taken at the end of the warm start, and again where the basis is refreshed.

Both kinds of basis are eigenvectors of a moment matrix: of the activations, Σ zᵀz over tokens (what the wire must
carry), or of the weights, WᵀW in Z = XW (the paper's reading: right singular vectors of W, uncentred).
No activations travel for this: the moments of all nodes are summed in an averaging round (`node.train.averaging`).

Shapes: G groups (1 for scope "layer", kv_heads for "head"), D width of a group, r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Moments = dict[tuple[int, str], Tensor]
"""Second moments [G, D, D] by layer and "k" or "v"; where they are wanted, also sums [G, 1, D] (`SUM`)."""

SUM = " sum"
"""What follows the kind in the key of a sum."""


def rank_of(share: float, width: int) -> int:
    """Rank that is left when `share` of `width` is compressed away; at least one direction."""
    return max(1, round((1.0 - share) * width))


def group_moments(z_K: Tensor, groups: int) -> Tensor:
    """Second moments Σ zᵀz of rows z [..., K], uncentred, one for each of `groups` equal parts of K: [G, D, D]."""
    rows_GtD = z_K.reshape(-1, groups, z_K.shape[-1] // groups).transpose(0, 1)
    with torch.autocast(z_K.device.type, enabled=False):  # in bf16 a sum over tokens would lose the small directions
        moments: Tensor = rows_GtD.mT @ rows_GtD
    return moments


class MomentProbe:
    """Takes the second moments of K and V while a model runs. `groups` says of which layers, in how many groups; with
    `sums` it takes the sums too."""

    def __init__(self, groups: Mapping[tuple[int, str], int], sums: bool = False) -> None:
        self.moments: Moments = {}
        self._groups, self._sums = groups, sums

    def see(self, layer: int, kind: str, z_CBnK: Tensor, codec: object, payload: tuple[Tensor, ...]) -> None:
        """What one layer's K, or V, adds (`node.model.key_value.Probe`)."""
        if (layer, kind) in self._groups:
            z_CBnK, groups = z_CBnK.detach().float(), self._groups[layer, kind]
            self._add((layer, kind), group_moments(z_CBnK, groups))
            if self._sums:
                self._add((layer, kind + SUM), z_CBnK.flatten(0, -2).sum(0).view(groups, 1, -1))

    def _add(self, key: tuple[int, str], found: Tensor) -> None:
        before = self.moments.get(key)
        self.moments[key] = found if before is None else before + found


def principal_directions(moments_GDD: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of each moment matrix, strongest first: [G, D, count], orthonormal columns.

    Signs are fixed (the largest entry of a direction is positive), so that equal moments give equal directions.
    """
    _, vectors_GDD = torch.linalg.eigh(moments_GDD.double())
    leading = vectors_GDD.flip(-1)[..., :count]
    largest = leading.abs().argmax(dim=-2, keepdim=True)
    signs = torch.where(leading.gather(-2, largest) < 0, -1.0, 1.0)
    directions: Tensor = (leading * signs).float()
    return directions


def align(leading_GDc: Tensor, near_GDc: Tensor, rank: int) -> Tensor:
    """The same subspaces in coordinates that lie nearest to those of an earlier basis.

    Each block of `rank` columns (Ū, and Ū₂ where a rotation has one) is turned within its own span, so what a
    projection keeps is as before the alignment: Ū ← Ū Q with the orthogonal Q that makes ‖Ū Q − Ū_old‖_F least
    (Procrustes: the polar factor of ŪᵀŪ_old). Numbers on the wire then go on where they were, and so does the plane in
    which θ turns each column, which pairs a column of Ū with one of Ū₂.
    """
    blocks = []
    for new, old in zip(leading_GDc.double().split(rank, -1), near_GDc.double().split(rank, -1), strict=True):
        left, _, right = torch.linalg.svd(new.mT @ old)
        blocks.append(new @ left @ right)
    return torch.cat(blocks, dim=-1).float()


def kept_energy(moments_GDD: Tensor, basis_GDr: Tensor) -> float:
    """Share of the activations' energy that lies in the basis: tr(ŪᵀMŪ) / tr(M), between 0 and 1."""
    moments, basis = moments_GDD.double(), basis_GDr.double()
    inside = torch.einsum("gdr,gde,ger->", basis, moments, basis)
    total = moments.diagonal(dim1=-2, dim2=-1).sum()
    return float(inside / total.clamp_min(1e-30))


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the tensors' bytes, for nodes to compare."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
