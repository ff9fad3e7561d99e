"""What one chunk sends per layer, as shapes and bytes: the closed formula that the wire is tested against.

A compressed layer sends, for K and for V, Zcomp [B, n, G·r] and θ [B, G·m]; any other layer sends K and V whole,
[B, n, d_kv] each. Gradients of the same shapes come back. A chunk goes once to each node that owns a later chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from coordinator.assignment import Assignment
from netem.errors import ConfigError
from node.config import CompressConfig, Config, ModelConfig
from node.schedule import PassSpec
from node.subspace.basis import rank_of
from node.subspace.codec import CodecShape
from node.subspace.rotation import make_rotation

WIRE_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The closed list of number formats that may travel."""


class TensorSpec(NamedTuple):
    """One tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def codec_shapes(model: ModelConfig, compress: CompressConfig) -> tuple[CodecShape, CodecShape]:
    """The codec shapes of K and of V that a config asks for. Raises `ConfigError` where a rank leaves no room."""
    groups = model.kv_heads if compress.scope == "head" else 1
    width = model.d_kv // groups
    rotation = make_rotation(compress.rotation, 0, compress.generator_norm)
    shapes = []
    for key, share in (("k_share", compress.k_share), ("v_share", compress.v_share)):
        rank = rank_of(share, width)
        if rotation.columns(rank) > width:
            raise ConfigError(
                f"compress.{key} = {share}: rotation {compress.rotation!r} wants {rotation.columns(rank)} directions "
                f"for rank {rank}, and there are {width}; raise the share, or use another rotation"
            )
        shapes.append(CodecShape(groups, width, rank, rotation.parameters))
    return shapes[0], shapes[1]


class PayloadFormat:
    """Shapes and sizes of every payload of a run."""

    def __init__(self, config: Config) -> None:
        self.layers = config.model.layers
        self._compressing: int = config.compressed_layers
        self.chunks = config.model.chunks
        self.batch = config.train.batch
        self._d_kv = config.model.d_kv
        self.dtype = WIRE_DTYPES[config.compress.wire_dtype]
        self.passes = {PassSpec(config.model.chunk_tokens, config.compressed_layers > 0)}
        if self._compressing:
            # The warm start, and the calibration that ends it.
            self.passes.add(PassSpec(config.warmup_chunk_tokens, False))
            self._shapes = codec_shapes(config.model, config.compress)
        self.silent = config.compress.mode == "local"

    def compresses(self, layer: int) -> bool:
        """Whether this layer has a codec."""
        return layer < self._compressing

    def tensors(self, layer: int, spec: PassSpec) -> tuple[TensorSpec, ...]:
        """The tensors that one chunk of one layer sends: those of K, then those of V."""
        if not (spec.compressed and self.compresses(layer)):
            return (TensorSpec((self.batch, spec.tokens, self._d_kv), self.dtype),) * 2
        tensors = []
        for shape in self._shapes:
            dtypes = (self.dtype, torch.float32)
            shapes = shape.payload_shapes(self.batch, spec.tokens)
            tensors += [TensorSpec(*pair) for pair in zip(shapes, dtypes, strict=False)]
        return tuple(tensors)

    def chunk_bytes(self, layer: int, spec: PassSpec) -> int:
        """Payload bytes of one chunk of one layer, one way, to one reader."""
        return sum(tensor.nbytes for tensor in self.tensors(layer, spec))


class StepBytes(NamedTuple):
    """Payload bytes that one node sends in one step's exchange, by kind of layer and direction."""

    compressed_forward: int
    compressed_backward: int
    dense_forward: int
    dense_backward: int

    @property
    def total(self) -> int:
        return sum(self)


def step_bytes(payload: PayloadFormat, assignment: Assignment, rank: int, spec: PassSpec) -> StepBytes:
    """The bytes that `rank` sends in one training step: payloads of its chunks to their readers, gradients to owners.

    The test of the wire compares this with what the links counted, and allows no difference.
    """
    if payload.silent:
        return StepBytes(0, 0, 0, 0)
    chunks = range(assignment.n_chunks)
    sent = sum(len(assignment.readers_of(chunk)) for chunk in chunks if assignment.owner(chunk) == rank)
    returned = sum(rank in assignment.readers_of(chunk) for chunk in chunks)
    sizes = {True: 0, False: 0}
    for layer in range(payload.layers):
        sizes[spec.compressed and payload.compresses(layer)] += payload.chunk_bytes(layer, spec)
    return StepBytes(sent * sizes[True], returned * sizes[True], sent * sizes[False], returned * sizes[False])
