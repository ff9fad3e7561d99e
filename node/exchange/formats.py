"""How one float tensor crosses the wire: the closed list of formats, with their exact bytes.

A format packs the last dimension of a tensor (a token's numbers) and unpacks it again. Every reader, also one on the
owner's node, sees `unpack(pack(z))`; the backward passes gradients straight through the rounding. Each scale belongs to
one token, so that no scale tells an earlier token of a later one.

Activations are rounded to the nearest value, and so are a function of the tokens. Gradients are rounded at random
(`draws`), so that their mean is exact, whichever node sums them. Stochastic rounding has √2 times the error of rounding
to nearest; averaging many draws reduces it. Measured on the weights that make K and V in a small model: int8 0.5 %
(nearest: 0.4), fp8 1.6 % (1.2), int4 8 % (6); but int4 to nearest makes V's gradient 0.4 % too short in every step.
bfloat16 is rounded to nearest (0.1 %), and top-k is biased. There is no error feedback: the gradient of a token occurs
once, so there is no later one that could take up the error.

`node.exchange.payload` says which tensor has which format.

Shapes: … are leading dimensions, w is the width of the last one, G the number of its groups, each with a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Packed = tuple[Tensor, ...]

Draws = Generator | Sequence[Generator] | None
"""The random numbers that round gradients: one generator, or one for each chunk of the tensor, so that the rounding of
a chunk does not depend on the chunks beside it."""

SCALE = torch.bfloat16
"""Scales have the range of float32, since gradients may be tiny, and take two bytes, since a compressed token may be no
more than five numbers."""

TOP_SHARE = 0.10
INT4_GROUP = 128
"""Numbers under one scale in int4. With one scale for a whole token, the largest of its 2,048 numbers would set the
resolution of all others."""

UNIT4_STEP = 0.335
"""Sixteen levels so far apart lose least of a normal distribution of variance 1 (Max, 1960)."""

FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX, _FLOAT8_FRACTION_BITS, _FLOAT8_LEAST_EXPONENT = 448.0, 3, -6


class TensorSpec(NamedTuple):
    """One tensor on the wire."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Format(Protocol):
    """One number format of the wire. Numbers that are not finite stay so."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that `pack` makes of a tensor of this shape, to the byte."""

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        """The tensors to send. With `draws` they are rounded at random, so that the mean over draws is x (bfloat16 and
        top-k are not)."""

    def unpack(self, packed: Packed, width: int) -> Tensor:
        """The float tensor [..., width] that was packed."""


class Plain:
    """The numbers as they are, in float32 or bfloat16 (to nearest)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec(shape, self._dtype),)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        return (x.to(self._dtype),)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return packed[0]


class Int8:
    """A scale per token, and integers of ±127."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return TensorSpec((*shape[:-1], 1), SCALE), TensorSpec(shape, torch.int8)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        scale, y = _scaled(x, 127.0, x.shape[-1])
        return scale, _round(y, draws).clamp_(-127, 127).to(torch.int8)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return _unscaled(packed[0], packed[1].float(), width)


class Int4:
    """A scale per token and group of 128 numbers, and integers of ±7, two to a byte (the lower half first)."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        groups, nibble_pairs = -(-shape[-1] // INT4_GROUP), -(-shape[-1] // 2)
        return TensorSpec((*shape[:-1], groups), SCALE), TensorSpec((*shape[:-1], nibble_pairs), torch.uint8)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        scale, y = _scaled(x, 7.0, INT4_GROUP)
        return scale, pack_bits(_round(y, draws).clamp_(-7, 7), 4)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return _unscaled(packed[0], unpack_bits(packed[1], width, 4).float(), INT4_GROUP)


class Int2:
    """A scale per token and group of 128 numbers, and four levels, ±½ and ±1½ of it, four to a byte.

    Activations take the scale that is best for a normal distribution, and what is larger is cut off; gradients the one
    that cuts nothing off.
    """

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        groups, fours = -(-shape[-1] // INT4_GROUP), -(-shape[-1] // 4)
        return TensorSpec((*shape[:-1], groups), SCALE), TensorSpec((*shape[:-1], fours), torch.uint8)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        scale, y = _scaled(x, 1.5, INT4_GROUP) if draws is not None else _scaled_by_size(x, INT4_GROUP)
        return scale, pack_bits(_round(y - 0.5, draws).clamp_(-2, 1), 2)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return _unscaled(packed[0], unpack_bits(packed[1], width, 2).float() + 0.5, INT4_GROUP)


class Unit4:
    """Sixteen levels a fixed step apart, none of them zero and without a scale, for numbers whose mean square is about
    1 (`compress.whitened`), two to a byte. The step is the best one for a normal distribution; what lies beyond the
    last level is cut off. Numbers that are not finite do not stay so."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*shape[:-1], -(-shape[-1] // 2)), torch.uint8),)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        return (pack_bits(_round(x.float() / UNIT4_STEP - 0.5, draws).clamp_(-8, 7), 4),)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return (unpack_bits(packed[0], width, 4).float() + 0.5) * UNIT4_STEP


class Float8:
    """A scale per token, and eight-bit floats (e4m3fn: 3 bits of fraction) that fill their range of ±448."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return TensorSpec((*shape[:-1], 1), SCALE), TensorSpec(shape, FLOAT8)

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        scale, y = _scaled(x, _FLOAT8_MAX, x.shape[-1])
        if draws is not None:
            _, exponent = torch.frexp(y)  # |y| = m · 2^exponent, ½ ≤ m < 1
            step = torch.ldexp(torch.ones_like(y), (exponent - 1).clamp_(min=_FLOAT8_LEAST_EXPONENT))
            step *= 2.0**-_FLOAT8_FRACTION_BITS
            y = _round(y / step, draws) * step
        return scale, y.clamp_(-_FLOAT8_MAX, _FLOAT8_MAX).to(FLOAT8)

    def unpack(self, packed: Packed, width: int) -> Tensor:
        return _unscaled(packed[0], packed[1].float(), width)


class TopShare:
    """The tenth of a token's numbers that is largest, in bfloat16, with their places; the others are zero."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        kept = (*shape[:-1], _kept(shape[-1]))
        return TensorSpec(kept, torch.bfloat16), TensorSpec(kept, _index_dtype(shape[-1]))

    def pack(self, x: Tensor, draws: Draws = None) -> Packed:
        places = x.abs().topk(_kept(x.shape[-1]), sorted=False).indices
        return x.gather(-1, places).to(torch.bfloat16), places.to(_index_dtype(x.shape[-1]))

    def unpack(self, packed: Packed, width: int) -> Tensor:
        values, places = packed
        return values.new_zeros(*values.shape[:-1], width).scatter_(-1, places.long(), values)


FORMATS: Mapping[str, Format] = {
    "float32": Plain(torch.float32),
    "bfloat16": Plain(torch.bfloat16),
    "int8": Int8(),
    "fp8": Float8(),
    "int4": Int4(),
    "topk10": TopShare(),
    "int2": Int2(),
    "unit4": Unit4(),
}
"""The formats that the config may name (`node.config.FormatName`)."""


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Integers of −2^(bits − 1) … 2^(bits − 1) − 1, [..., w], to bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    parts = F.pad(q, (0, -q.shape[-1] % per_byte)).add(2 ** (bits - 1)).to(torch.uint8).unflatten(-1, (-1, per_byte))
    packed: Tensor = parts[..., 0].clone()
    for place in range(1, per_byte):
        packed |= parts[..., place] << (place * bits)
    return packed


def unpack_bits(packed: Tensor, width: int, bits: int) -> Tensor:
    """Back from `pack_bits`, as int8 [..., width]."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    found: Tensor = torch.stack(parts, -1).flatten(-2)[..., :width].to(torch.int8) - 2 ** (bits - 1)
    return found


def _scaled_by_size(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As `_scaled`, with the root of each group's mean square as its scale, which fits four levels best."""
    width = x.shape[-1]
    x_Gg = F.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    sizes = [min(group, width - start) for start in range(0, width, group)]
    counts_G = torch.tensor(sizes, dtype=torch.float32, device=x.device)
    scale_G = (x_Gg.square().sum(-1) / counts_G).sqrt().to(SCALE)
    divisor_G1 = scale_G.float().unsqueeze(-1)
    y_Gg = x_Gg / torch.where(divisor_G1 > 0, divisor_G1, 1.0)
    return scale_G, y_Gg.flatten(-2)[..., :width]


def _scaled(x: Tensor, largest: float, group: int) -> tuple[Tensor, Tensor]:
    """A scale for each group of the last dimension, [..., G], and x over its scale, within ±largest (float32)."""
    width = x.shape[-1]
    x_Gg = F.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    # The scale is a little larger than needed, so that rounding the scale itself cuts no number off.
    scale_G = (x_Gg.abs().amax(-1) * ((1 + 2**-8) / largest)).to(SCALE)
    divisor_G1 = scale_G.float().unsqueeze(-1)
    y_Gg = x_Gg / torch.where(divisor_G1 > 0, divisor_G1, 1.0)
    return scale_G, y_Gg.flatten(-2)[..., :width]


def _unscaled(scale_G: Tensor, y: Tensor, group: int) -> Tensor:
    if scale_G.shape[-1] == 1:
        return y * scale_G.float()
    return y * scale_G.float().repeat_interleave(group, -1)[..., : y.shape[-1]]


def _round(y: Tensor, draws: Draws) -> Tensor:
    """Round to nearest, or at random to one of the two neighbours, with E[⌊y + u⌋] = y."""
    if draws is None:
        return y.round()
    if isinstance(draws, Generator):
        uniform = torch.rand(y.shape, generator=draws, device=y.device)
    else:
        uniform = torch.stack(
            [torch.rand(one.shape, generator=g, device=y.device) for one, g in zip(y, draws, strict=True)]
        )
    return (y + uniform).floor_()


def _kept(width: int) -> int:
    return max(1, round(TOP_SHARE * width))


def _index_dtype(width: int) -> torch.dtype:
    """The smallest integer type that holds a place in `width`."""
    if width <= 1 << 8:
        return torch.uint8
    return torch.uint16 if width <= 1 << 16 else torch.int32
