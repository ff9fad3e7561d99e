"""How a shard of an averaging round crosses the wire: the formats of `node.exchange.formats` on a flat vector.

A flat vector has no tokens to hold a scale, so groups of 256 numbers take their place; the last group may be shorter.
The ring sums in float32 and rounds what it sends, at every hop. What the formats with few bits round away is fed back
(`feeds_back`): the node adds it to what it sends of the same numbers the next time (`node.train.averaging`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from node.config.compress import RingName
from node.exchange.formats import FORMATS, TensorSpec

GROUP = 256


class RingFormat:
    """One way for a flat float32 vector to travel as bytes. Numbers that are not finite come out not finite."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.feeds_back = name not in ("float32", "bfloat16")
        self._format = FORMATS[name]

    def nbytes(self, n_elements: int) -> int:
        """The bytes of a shard of so many numbers."""
        return sum(spec.nbytes for shape in self._shapes(n_elements) for spec in self._format.specs(shape))

    def encode(self, shard: Tensor) -> Tensor:
        """The bytes of `shard` [n] as a flat uint8 tensor. In float32 it is the memory of `shard` itself."""
        parts = []
        for shape, (start, stop) in self._spans(len(shard)):
            parts += [as_bytes(part) for part in self._format.pack(shard[start:stop].view(shape))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, packed: Tensor, n_elements: int) -> Tensor:
        """The float32 numbers [n] of what was encoded; in float32 over the memory of `packed`."""
        pieces, start = [], 0
        for shape in self._shapes(n_elements):
            tensors = []
            for spec in self._format.specs(shape):
                tensors.append(_tensor(packed[start : start + spec.nbytes], spec))
                start += spec.nbytes
            pieces.append(self._format.unpack(tuple(tensors), shape[-1]).float().view(-1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _spans(self, n_elements: int) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
        """The shapes in which the vector is packed, each with its first number and the one after its last."""
        whole = n_elements - n_elements % GROUP
        if not self.feeds_back:
            return [((n_elements,), (0, n_elements))]
        spans: list[tuple[tuple[int, ...], tuple[int, int]]] = []
        if whole:
            spans.append(((whole // GROUP, GROUP), (0, whole)))
        if whole < n_elements:
            spans.append(((1, n_elements - whole), (whole, n_elements)))
        return spans

    def _shapes(self, n_elements: int) -> list[tuple[int, ...]]:
        return [shape for shape, _ in self._spans(n_elements)]


RING_FORMATS: Mapping[str, RingFormat] = {name: RingFormat(name) for name in get_args(RingName)}
"""What `train.sync_format` may name."""

FLOAT32 = RING_FORMATS["float32"]


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory in row-major order, as a flat uint8 tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _tensor(data: Tensor, spec: TensorSpec) -> Tensor:
    if data.storage_offset() % spec.dtype.itemsize:
        data = data.clone()  # it would lie across words
    return data.view(spec.dtype).view(spec.shape)
