"""A learned subspace (`compress.subspace = "learned"`): the basis is trained on, where the paper freezes Ū.

z̃ = (z D) Uᵀ: D and U are both Ū at the end of the warm start, and are weights like all others from then on. The payload
has the same size, z D with n·r numbers, and so has the gradient, ∂L/∂(z D) = (∂L/∂z̃) U. So a basis that was taken early
can still change, and the K and V that other chunks see need not be a projection of those within the chunk.
(DeepSeek-V2's latent attention also makes keys and values from a small latent by learned matrices.)

Between averagings of weights an owner's D and a reader's U drift apart a little, as all of their weights do. Nothing
else has to be equal: the basis checksum covers the start, and the weights' digest everything after it.

Centred (`compress.centred`), the mean μ of z at the start is known to all and does not travel: the payload is
(z − μ) D, and z̃ = payload Uᵀ + μ. (Some layers' keys have nine tenths of their energy in their mean. It would take a
direction, and set the scale by which all others are rounded.) Whitened too (`compress.whitened`), each number is
divided by its root mean square s at the start: ((z − μ) D) / s, and z̃ = (payload s) Uᵀ + μ. Then a format that has one
scale for all numbers of a token, or a fixed one, rounds a weak direction as finely, for its size, as a strong one.

Shapes: as in `node.subspace.codec`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from node.subspace.codec import Codec

_LEAST_SIZE = 1e-6
"""A direction that carries nothing is not divided by zero."""


class LearnedCodec(Codec):
    """A codec whose subspace starts at the basis and is trained. It does not turn: there is no θ."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert self.shape.parameters == 0
        self.down, self.up = nn.Parameter(self.leading.clone()), nn.Parameter(self.leading.clone())

    def fit(self) -> None:
        super().fit()
        for matrix in (self.down, self.up):  # the optimizer knows them by identity, and has no moments of them yet
            if matrix.shape != self.leading.shape:
                matrix.data = self.leading.clone()

    def start(self) -> None:
        with torch.no_grad():
            self.down.copy_(self.leading)
            self.up.copy_(self.leading)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def decoders(self, uses: int) -> tuple[Tensor | None, ...]:
        return self.up.expand(uses, *self.up.shape).unbind(0)

    def tie(self, anchor: Tensor) -> Tensor:
        return anchor + 0.0 * self.up.sum()

    def compress(self, z_CBnGD: Tensor, theta_CBp: Tensor) -> tuple[Tensor, ...]:
        return (torch.einsum("cbngd,gdr->cbngr", z_CBnGD, self.down.to(z_CBnGD.dtype)).flatten(-2),)

    def decode(self, payload: tuple[Tensor, ...], dtype: torch.dtype, decoder: Tensor | None = None) -> Tensor:
        up_GDr = self.up if decoder is None else decoder
        compressed_BnGr = payload[0].to(dtype).unflatten(-1, (self.shape.groups, self.shape.rank))
        return torch.einsum("bngr,gdr->bngd", compressed_BnGr, up_GDr.to(dtype)).flatten(-2)


class CentredCodec(LearnedCodec):
    """A learned codec of what K and V are beside their mean; with `whitens`, its numbers have a mean square of 1 at the
    start."""

    mean: Tensor
    sizes: Tensor

    def __init__(self, *arguments: Any, whitens: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._whitens = whitens
        groups, width = self.leading.shape[:2]
        self.register_buffer("mean", torch.zeros(groups, width))
        self.register_buffer("sizes", torch.ones(groups, self.leading.shape[-1]))

    def fit(self) -> None:
        super().fit()
        if self.sizes.shape[-1] != self.leading.shape[-1]:
            self.sizes = self.sizes.new_ones(self.leading.shape[0], self.leading.shape[-1])

    def set_centre(self, products_GDD: Tensor, mean_GD: Tensor) -> None:
        """Take mean and sizes, once the basis is set; `products_GDD` are the mean products of what is centred."""
        self.mean.copy_(mean_GD)
        if not self._whitens:
            return
        leading = self.leading.double()
        squares_Gr = torch.einsum("gdr,gde,ger->gr", leading, products_GDD.double(), leading)
        self.sizes.copy_(squares_Gr.clamp_min(_LEAST_SIZE**2).sqrt())

    def shared(self) -> list[Tensor]:
        return [self.leading, self.mean, self.sizes]

    def compress(self, z_CBnGD: Tensor, theta_CBp: Tensor) -> tuple[Tensor, ...]:
        dtype = z_CBnGD.dtype
        (compressed,) = super().compress(z_CBnGD - self.mean.to(dtype), theta_CBp)
        return (compressed / self.sizes.flatten().to(dtype),)

    def decode(self, payload: tuple[Tensor, ...], dtype: torch.dtype, decoder: Tensor | None = None) -> Tensor:
        found = super().decode((payload[0].to(dtype) * self.sizes.flatten().to(dtype),), dtype, decoder)
        return found + self.mean.flatten().to(dtype)
