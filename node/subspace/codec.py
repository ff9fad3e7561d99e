"""Encode and decode of one layer's K, or V: the payload (Z U(θ), θ) and its way back (the paper's Algorithm 1).

The codec is the same for a chunk that stays on its node and for one that travels; rounding to the wire's number
format is part of `encode`, so the model is one function of the tokens whoever owns what. Both directions are plain
torch operations: the compressed backward, ∂L/∂Zcomp = (∂L/∂Z̃) U, is what autograd makes of `decode`.

Shapes: C own chunks, B batch, n tokens of a chunk, K = d_kv, G groups, D = K/G, r rank, m numbers of θ a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from node.seeds import derive
from node.subspace.basis import principal_directions
from node.subspace.rotation import Directions, Rotation


class CodecShape(NamedTuple):
    """What fixes a payload's size: G groups of width D, rank r, m numbers of θ a group."""

    groups: int
    width: int
    rank: int
    parameters: int

    def payload_shapes(self, batch: int, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors that one chunk sends: Zcomp [B, n, G·r], and θ [B, G·m] if there is one."""
        compressed = (batch, tokens, self.groups * self.rank)
        theta = (batch, self.groups * self.parameters)
        return (compressed, theta) if self.parameters else (compressed,)


class Codec(nn.Module):
    """One layer's compression of K, or of V. Unusable until `set_basis` (before it, the layer sends dense)."""

    directions: Directions

    def __init__(self, shape: CodecShape, rotation: Rotation, clip: float, wire_dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self._rotation = rotation
        self._clip = clip
        self._wire_dtype = wire_dtype
        self._seed = seed
        # ψ starts at zero: U = Ū, and the gradient of θ says where to turn first.
        learned = rotation.learned and rotation.parameters > 0
        self.psi = nn.Parameter(torch.zeros(shape.groups, shape.parameters, shape.width)) if learned else None
        self.register_buffer("leading", torch.zeros(shape.groups, shape.width, rotation.columns(shape.rank)))
        self.leading: Tensor
        self.directions = ()

    def set_moments(self, moments_GDD: Tensor) -> None:
        """Take the principal directions of second moments as the basis."""
        self.set_basis(principal_directions(moments_GDD, self._rotation.columns(self.shape.rank)))

    def set_basis(self, leading_GDc: Tensor) -> None:
        """Take these principal directions, equal on all nodes, as the basis."""
        self.leading.copy_(leading_GDc)
        self.directions = self._rotation.prepare(self.leading, self.shape.rank)

    def encode(self, z_CBnK: Tensor, chunks: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Compress the own chunks: Zcomp [C, B, n, G·r] in the wire's dtype, and θ [C, B, G·m] in float32 (or none)."""
        groups, width, _, parameters = self.shape
        z_CBnGD = z_CBnK.unflatten(-1, (groups, width))
        theta_CBGm = self._theta(z_CBnGD, chunks)
        u_CBGDr = self._rotation.turn(self.directions, theta_CBGm)
        compressed = torch.einsum("cbngd,cbgdr->cbngr", z_CBnGD, u_CBGDr.to(z_CBnGD.dtype))
        payload = compressed.flatten(-2).to(self._wire_dtype)
        return (payload, theta_CBGm.flatten(-2)) if parameters else (payload,)

    def decode(self, payload: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Z̃ [B, n, K] = Zcomp U(θ)ᵀ of one chunk, from its Zcomp [B, n, G·r] and θ [B, G·m]."""
        groups, _, rank, parameters = self.shape
        compressed_BnGr = payload[0].to(dtype).unflatten(-1, (groups, rank))
        if parameters:
            theta_BGm = payload[1].unflatten(-1, (groups, parameters))
        else:
            theta_BGm = compressed_BnGr.new_zeros(compressed_BnGr.shape[0], groups, 0)
        u_BGDr = self._rotation.turn(self.directions, theta_BGm)
        return torch.einsum("bngr,bgdr->bngd", compressed_BnGr, u_BGDr.to(dtype)).flatten(-2)

    def _theta(self, z_CBnGD: Tensor, chunks: tuple[int, ...]) -> Tensor:
        """θ [C, B, G, m] of the own chunks, |θ| ≤ clip: ψ of the chunk's mean, or drawn from seed and chunk index."""
        chunk_count, batch = z_CBnGD.shape[:2]
        groups, _, _, parameters = self.shape
        if self.psi is not None:
            mean_CBGD = z_CBnGD.float().mean(dim=2)
            # Not a matrix product: autocast would make one of it in bf16, and θ travels in float32.
            theta_CBGm = (mean_CBGD.unsqueeze(-2) * self.psi).sum(-1)
            return theta_CBGm.clamp(-self._clip, self._clip)
        drawn = [self._drawn(chunk) for chunk in chunks]
        stacked = torch.stack(drawn).to(z_CBnGD.device) if drawn else z_CBnGD.new_zeros(0, groups, parameters)
        return stacked.unsqueeze(1).expand(chunk_count, batch, groups, parameters)

    def _drawn(self, chunk: int) -> Tensor:
        """θ [G, m] of a rotation that is not learned: uniform in ±clip, the same on every node and in every step."""
        source = torch.Generator().manual_seed(derive(self._seed, "theta", chunk))
        uniform = torch.rand(self.shape.groups, self.shape.parameters, generator=source)
        return (2.0 * uniform - 1.0) * self._clip
