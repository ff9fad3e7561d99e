"""How one layer's keys and values become a payload, and what a payload gives back.

`KeyValueCodecs` compresses both by codecs; `Whole` sends them as they are. The exchanged attention
(`node.model.exchanged`) uses either through the same four methods.

Shapes: C own chunks, B batch, n tokens of a chunk, K = d_kv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from node.config import CompressConfig
from node.config.seeds import derive
from node.exchange.chunks import Pass
from node.exchange.payload import Payload
from node.subspace.codec import Codec
from node.subspace.learned import CentredCodec, LearnedCodec
from node.subspace.ranks import RankTable, rotation_of

Decode = Callable[[Payload, torch.dtype], tuple[Tensor, Tensor]]
"""K and V [..., n, K] in a dtype, from a payload [..., n, …]."""


class Probe(Protocol):
    """What looks at K and V while a model runs, and changes nothing."""

    def see(self, layer: int, kind: str, z_CBnK: Tensor, codec: Codec | None, payload: Payload) -> None:
        """One layer's K, or V, of the own chunks. `codec` made `payload` of it; without one it is sent whole."""


class KeyValue(Protocol):
    """One layer's way from K and V to a payload and back."""

    def encode(self, k_CBnK: Tensor, v_CBnK: Tensor, step: Pass) -> Payload:
        """The payload of the own chunks: K's tensors, then V's."""

    def decoders(self, uses: Sequence[int]) -> Mapping[int, Decode]:
        """One decoder for each use, since their gradients are added in the order of `uses`, not of arrival."""

    def tie(self, anchor: Tensor) -> Tensor:
        """The exchange's anchor, made to depend on all that a decoder is trained by: a node that reads no other chunk,
        and so decodes nothing, must have gradients of zero to add to the others', not none."""

    def show(self, probe: Probe, k_CBnK: Tensor, v_CBnK: Tensor, payload: Payload) -> None:
        """Let a probe look."""


class Whole:
    """K and V as they are: the codec of a layer, or of a pass, that does not compress."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def encode(self, k_CBnK: Tensor, v_CBnK: Tensor, step: Pass) -> Payload:
        return k_CBnK, v_CBnK

    def decoders(self, uses: Sequence[int]) -> Mapping[int, Decode]:
        return dict.fromkeys(uses, _as_sent)

    def tie(self, anchor: Tensor) -> Tensor:
        return anchor

    def show(self, probe: Probe, k_CBnK: Tensor, v_CBnK: Tensor, payload: Payload) -> None:
        probe.see(self._layer, "k", k_CBnK, None, ())
        probe.see(self._layer, "v", v_CBnK, None, ())


class KeyValueCodecs(nn.Module):
    """K and V in subspaces, by a codec each."""

    def __init__(self, k: Codec, v: Codec, layer: int, hands_on: bool) -> None:
        super().__init__()
        self.k, self.v = k, v
        self._layer, self._hands_on = layer, hands_on

    def encode(self, k_CBnK: Tensor, v_CBnK: Tensor, step: Pass) -> Payload:
        """θ of each chunk is from itself, or handed on from the chunk before. Where attention stays within a document,
        it is from the rows that others see: they are of one document, and nobody else uses θ."""
        own = step.exchange.own
        k_CBnGD, v_CBnGD = self.k.grouped(k_CBnK), self.v.grouped(v_CBnK)
        begins_CB = None
        if step.documents is not None:
            begins = [step.documents.tail_begins(chunk) for chunk in own]
            begins_CB = torch.tensor(begins, device=k_CBnK.device)
        thetas = self.k.theta(k_CBnGD, own, begins_CB), self.v.theta(v_CBnGD, own, begins_CB)
        if self._hands_on:
            handed = step.hand_on(self._layer, torch.cat(thetas, dim=-1))
            k_theta, v_theta = handed.split([theta.shape[-1] for theta in thetas], dim=-1)
        else:
            k_theta, v_theta = thetas
        return self.k.compress(k_CBnGD, k_theta) + self.v.compress(v_CBnGD, v_theta)

    def decoders(self, uses: Sequence[int]) -> Mapping[int, Decode]:
        pairs = zip(self.k.decoders(len(uses)), self.v.decoders(len(uses)), strict=True)
        return {use: partial(self._decode, k, v) for use, (k, v) in zip(uses, pairs, strict=True)}

    def tie(self, anchor: Tensor) -> Tensor:
        return self.v.tie(self.k.tie(anchor))

    def show(self, probe: Probe, k_CBnK: Tensor, v_CBnK: Tensor, payload: Payload) -> None:
        half = len(payload) // 2
        probe.see(self._layer, "k", k_CBnK, self.k, payload[:half])
        probe.see(self._layer, "v", v_CBnK, self.v, payload[half:])

    def _decode(
        self, k: Tensor | None, v: Tensor | None, payload: Payload, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        half = len(payload) // 2
        return self.k.decode(payload[:half], dtype, k), self.v.decode(payload[half:], dtype, v)


def key_value_codecs(compress: CompressConfig, seed: int, ranks: RankTable, layer: int) -> KeyValueCodecs:
    """The codecs of a layer that compresses. `seed` is the run's."""
    k, v = (_codec(compress, seed, ranks, layer, kind) for kind in "kv")
    return KeyValueCodecs(k, v, layer, compress.hands_theta_on)


def _codec(compress: CompressConfig, seed: int, ranks: RankTable, layer: int, kind: str) -> Codec:
    stream = derive(seed, "rotation", layer, kind)
    source = "first" if compress.theta == "first" else "mean"
    arguments = (ranks, (layer, kind), rotation_of(compress, stream), compress.clip, stream, source)
    if compress.subspace == "learned":
        if compress.centred:
            return CentredCodec(*arguments, whitens=compress.whitened)
        return LearnedCodec(*arguments)
    return Codec(*arguments)


def _as_sent(payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = payload
    return k.to(dtype), v.to(dtype)
