"""Encode and decode of one layer's K, or V: the payload (Z U(θ), θ) and its way back (the paper's Algorithm 1).

The codec is the same for a chunk that stays on its node and for one that travels. It does not round: how numbers
cross the wire is the exchange's business (`node.exchange.formats`). Both directions are plain torch operations: the
compressed backward, ∂L/∂Zcomp = (∂L/∂Z̃) U, is what autograd makes of `decode`.

Shapes: C own chunks, B batch, n tokens of a chunk, K = d_kv, G groups, D = K/G, r rank, m numbers of θ a group.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from node.config.seeds import derive
from node.subspace.basis import align, principal_directions
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


Key = tuple[int, str]
"""A layer, and "k" or "v"."""


class Shapes(Protocol):
    """Where a codec looks up its shape (`node.subspace.ranks.RankTable`)."""

    def __getitem__(self, key: Key) -> CodecShape: ...


class Codec(nn.Module):
    """One layer's compression of K, or of V. It cannot be used before `set_basis`; until then the layer sends K and V
    whole.

    `shapes` gives the codec's shape when it is asked for `key`: the node's rank table, where a rank may still change.

    `source` says what ψ reads of a chunk: "mean", the mean over its tokens (the paper), or "first", its first token,
    which all later tokens of the chunk may depend on.
    """

    directions: Directions

    def __init__(
        self, shapes: Shapes, key: Key, rotation: Rotation, clip: float, seed: int, source: str = "mean"
    ) -> None:
        super().__init__()
        self._shapes, self._key = shapes, key
        shape = self.shape
        self.clip = clip
        self._rotation = rotation
        self._seed = seed
        self._source = source
        # ψ starts at zero: U = Ū, and the gradient of θ says where to turn first.
        learned = rotation.learned and rotation.parameters > 0
        self.psi = nn.Parameter(torch.zeros(shape.groups, shape.parameters, shape.width)) if learned else None
        self.register_buffer("leading", torch.zeros(shape.groups, shape.width, rotation.columns(shape.rank)))
        self.leading: Tensor
        self.directions = ()

    @property
    def shape(self) -> CodecShape:
        """The codec's shape now. Only the rank may change, once, before the first basis; ψ does not depend on it."""
        return self._shapes[self._key]

    def fit(self) -> None:
        """Make room for a basis of the rank that the table has by now."""
        columns = self.columns(self.shape.rank)
        if self.leading.shape[-1] != columns:
            self.leading = self.leading.new_zeros(*self.leading.shape[:2], columns)

    def columns(self, rank: int) -> int:
        """How many principal directions a subspace of `rank` takes."""
        return self._rotation.columns(rank)

    def set_moments(self, moments_GDD: Tensor, near: Tensor | None = None) -> None:
        """Take the principal directions of second moments as the basis, aligned to the basis `near`, if given."""
        leading_GDc = principal_directions(moments_GDD, self._rotation.columns(self.shape.rank))
        self.set_basis(leading_GDc if near is None else align(leading_GDc, near, self.shape.rank))

    def set_basis(self, leading_GDc: Tensor) -> None:
        """Take these principal directions, equal on all nodes, as the basis."""
        self.fit()
        self.leading.copy_(leading_GDc)
        self.directions = self._rotation.prepare(self.leading, self.shape.rank)

    def shared(self) -> list[Tensor]:
        """What is made of moments, and rank 0 gives to all."""
        return [self.leading]

    def start(self) -> None:
        """Training with the basis begins: it has just been taken."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The two matrices of a codec without rotation, [G, D, r] each: z̃ = z · encode · decodeᵀ."""
        basis_GDr = self.leading[..., : self.shape.rank]
        return basis_GDr, basis_GDr

    def decoders(self, uses: int) -> tuple[Tensor | None, ...]:
        """The matrix that `decode` takes for each use, where that matrix is trained: one view for each use, since their
        gradients must be added in the order of use, not of arrival."""
        return (None,) * uses

    def tie(self, anchor: Tensor) -> Tensor:
        """The exchange's anchor, made to depend on the trained matrix of `decode`. A node that reads no other chunk
        decodes nothing; its gradient of that matrix must be zero, not missing, so that nodes can add theirs."""
        return anchor

    def encode(self, z_CBnK: Tensor, chunks: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Compress the own chunks by the θ of each: Zcomp [C, B, n, G·r] and θ [C, B, G·m] in float32 (or none)."""
        z_CBnGD = self.grouped(z_CBnK)
        return self.compress(z_CBnGD, self.theta(z_CBnGD, chunks))

    def grouped(self, z_CBnK: Tensor) -> Tensor:
        """z [..., G, D]. `theta` and `compress` share one such view, so that their gradients are added in one order."""
        z_CBnGD: Tensor = z_CBnK.unflatten(-1, (self.shape.groups, self.shape.width))
        return z_CBnGD

    def theta(self, z_CBnGD: Tensor, chunks: tuple[int, ...], begins_CB: Tensor | None = None) -> Tensor:
        """θ [C, B, G·m] of the own chunks, |θ| ≤ clip: ψ of the chunk, or drawn from seed and chunk index. With
        `begins_CB`, ψ of the tokens from there on; θ is 0 where there is none."""
        groups, _, _, parameters = self.shape
        chunk_count, batch = z_CBnGD.shape[:2]
        if self.psi is not None:
            seen_CBGD = self._seen(z_CBnGD) if begins_CB is None else self._seen_from(z_CBnGD, begins_CB)
            # This is no matrix product: autocast would compute one in bf16, and θ travels in float32.
            theta_CBGm = (seen_CBGD.unsqueeze(-2) * self.psi).sum(-1)
            theta_CBp: Tensor = theta_CBGm.clamp(-self.clip, self.clip).flatten(-2)
            return theta_CBp
        drawn = [self._drawn(chunk) for chunk in chunks]
        stacked = torch.stack(drawn).to(z_CBnGD.device) if drawn else z_CBnGD.new_zeros(0, groups, parameters)
        return stacked.unsqueeze(1).expand(chunk_count, batch, groups, parameters).flatten(-2)

    def _seen(self, z_CBnGD: Tensor) -> Tensor:
        """What ψ reads of each chunk."""
        return z_CBnGD.float().mean(dim=2) if self._source == "mean" else z_CBnGD[:, :, 0].float()

    def _seen_from(self, z_CBnGD: Tensor, begins_CB: Tensor) -> Tensor:
        """What ψ reads of the tokens of each chunk from `begins` on: exactly nothing of those before."""
        tokens_n = torch.arange(z_CBnGD.shape[2], device=z_CBnGD.device)
        begins_CB1 = begins_CB.unsqueeze(-1)
        read_CBn = tokens_n >= begins_CB1 if self._source == "mean" else tokens_n == begins_CB1
        read = torch.where(read_CBn[..., None, None], z_CBnGD.float(), 0.0)
        count_CB = read_CBn.sum(2).clamp(min=1)
        return read.sum(dim=2) / count_CB[..., None, None]

    def compress(self, z_CBnGD: Tensor, theta_CBp: Tensor) -> tuple[Tensor, ...]:
        """The payload of the own chunks at this θ [C, B, G·m]."""
        groups, _, _, parameters = self.shape
        u_CBGDr = self._rotation.turn(self.directions, theta_CBp.unflatten(-1, (groups, parameters)))
        compressed = torch.einsum("cbngd,cbgdr->cbngr", z_CBnGD, u_CBGDr.to(z_CBnGD.dtype)).flatten(-2)
        return (compressed, theta_CBp) if parameters else (compressed,)

    def decode(self, payload: tuple[Tensor, ...], dtype: torch.dtype, decoder: Tensor | None = None) -> Tensor:
        """Z̃ [B, n, K] = Zcomp U(θ)ᵀ of one chunk, from its Zcomp [B, n, G·r] and θ [B, G·m], by one of `decoders`."""
        groups, _, rank, parameters = self.shape
        compressed_BnGr = payload[0].to(dtype).unflatten(-1, (groups, rank))
        if parameters:
            theta_BGm = payload[1].unflatten(-1, (groups, parameters))
        else:
            theta_BGm = compressed_BnGr.new_zeros(compressed_BnGr.shape[0], groups, 0)
        u_BGDr = self._rotation.turn(self.directions, theta_BGm)
        return torch.einsum("bngr,bgdr->bngd", compressed_BnGr, u_BGDr.to(dtype)).flatten(-2)

    def _drawn(self, chunk: int) -> Tensor:
        """θ [G, m] of a rotation that is not learned: uniform in ±clip, the same on every node and in every step."""
        source = torch.Generator().manual_seed(derive(self._seed, "theta", chunk))
        uniform = torch.rand(self.shape.groups, self.shape.parameters, generator=source)
        return (2.0 * uniform - 1.0) * self.clip
