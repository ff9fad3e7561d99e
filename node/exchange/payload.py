"""What one chunk sends per layer, as shapes and bytes: the closed formula that the wire is tested against.

A compressed layer sends, for K and for V, Zcomp [B, n, G·r] and θ [B, G·m]; any other layer sends K and V whole,
[B, n, d_kv] each; a layer that sees only its own chunk sends nothing. Gradients of the same shapes come back. A chunk
goes once to each node that owns a later chunk. Each of these tensors crosses in its format (`node.exchange.formats`),
gradients in one of their own where `compress.grad_format` says so, which makes one or two tensors of it; θ, a few
numbers on which a whole chunk hangs, is always float32.

Where a chunk's θ is computed from the chunk before it (`compress.theta = "previous"`), the owner of that chunk sends it
to the owner of the next one, who needs it to encode: θ of K and V of one layer, [B, 2·G·m] in float32, one way, and its
gradient back, wherever the two owners differ.

Where attention stays within a document (`data.document_masking`), a reader gets only the rows of a chunk that its
chunks attend to, in all contexts of a pass together: Zcomp [rows, G·r] in place of [B, n, G·r], or K and V
[rows, d_kv], and nothing at all where there is no such row (`node.exchange.documents`). θ remains [B, G·m].

Where payloads are relayed (`node.exchange.routes`), each still comes to each reader once, in pieces that other readers
may have passed on. Gradients and θ go straight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from coordinator.assignment import Assignment
from netem.errors import ConfigError
from node.config import CompressConfig, FormatName, ModelConfig, TrainConfig
from node.exchange.documents import Documents
from node.exchange.formats import FORMATS, Draws, Format, Packed, TensorSpec
from node.exchange.passes import PassSpec
from node.exchange.routes import routes_for
from node.subspace.codec import CodecShape, Key
from node.subspace.ranks import RankTable, rank_bounds, rank_table

Payload = tuple[Tensor, ...]


class Part(NamedTuple):
    """One float tensor of a payload, and how it crosses."""

    shape: tuple[int, ...]
    format: Format

    @property
    def by_token(self) -> bool:
        """Whether this has a row for each token of a chunk, [B, n, …], as all but θ have."""
        return len(self.shape) == 3


def formats_of(compress: CompressConfig) -> tuple[FormatName, FormatName]:
    """The formats of compressed payloads, and of those that are sent whole."""
    return compress.format, compress.format if compress.dense_format == "same" else compress.dense_format


class PayloadFormat:
    """Shapes and sizes of every payload of a run, at the ranks of `ranks`, the table that the node's codecs read too.
    Without it, the table is the one that the config gives. Where ranks are chosen in the run, no compressed payload is
    expected before they are. `documents` says whether attention stays within a document."""

    def __init__(
        self,
        model: ModelConfig,
        compress: CompressConfig,
        train: TrainConfig,
        seed: int,
        ranks: RankTable | None = None,
        documents: bool = False,
    ) -> None:
        self.ranks = rank_table(model, compress) if ranks is None else ranks
        self.layers = model.layers
        self._local_layers = compress.local_of(model.layers)
        self.chunks = model.chunks
        self.batch = train.batch // train.micro_batches
        """Contexts in one pass."""
        self.micro_batches = train.micro_batches
        """Training passes that are in flight together."""
        self.documents = documents
        """Whether readers get the rows of a chunk that they attend to, and not all."""
        self.seed = seed
        """The run's, from which roundings at random are drawn."""
        self._d_kv = model.d_kv
        self._format, self._dense_format = formats_of(compress)
        self._grad_format = None if compress.grad_format == "same" else compress.grad_format
        self._full = PassSpec(model.chunk_tokens, compress.compresses)
        self._hands_on = compress.hands_theta_on
        self.budget_bytes = compress.budget_bytes_per_token * self.batch * model.chunk_tokens
        """Bytes of one chunk of all compressed layers, to one reader; 0 where ranks go by share."""
        self._others: set[PassSpec] = set()
        if self.ranks:
            # The warm start, and the calibration that ends it.
            self._others.add(PassSpec(compress.warm_start_tokens(model.chunk_tokens), False))
        if compress.is_unplugged_at(train.steps):
            self._others.add(self._full._replace(compressed=False))
        self.rank_bounds = rank_bounds(model, compress)
        """The least and the greatest rank that a budget may give."""
        if self.ranks and self.budget_bytes:
            self._check_budget(compress.budget_bytes_per_token)
        used = {self._dense_format, self._grad_format or self._dense_format} | ({self._format} if self.ranks else set())
        self._plain = FORMATS["float32" if used == {"float32"} else "bfloat16"]

    @property
    def passes(self) -> set[PassSpec]:
        """The kinds of pass whose payloads may come."""
        return self._others | {self._full} if self.ranks.chosen else self._others

    def compresses(self, layer: int) -> bool:
        """Whether this layer has a codec."""
        return layer in self.ranks.layers

    def exchanges(self, layer: int) -> bool:
        """Whether chunks of this layer see others, and are sent."""
        return layer >= self._local_layers

    def last_gradient(self, spec: PassSpec) -> tuple[int, str]:
        """The layer and the kind of the last gradients that the backward of a pass waits for."""
        layer = self._local_layers
        return layer, "dtheta" if layer < self.layers and self.message("dtheta", layer, spec) else "grad"

    def format_name(self, layer: int, spec: PassSpec, kind: str = "kv") -> FormatName:
        """The format of this layer's payload, or of its gradient (θ apart), which its tag names."""
        if kind == "grad" and self._grad_format:
            return self._grad_format
        return self._format if spec.compressed and self.compresses(layer) else self._dense_format

    def parts(self, layer: int, spec: PassSpec, kind: str = "kv", rows: int | None = None) -> tuple[Part, ...]:
        """The float tensors that one chunk of one layer shows its readers ("kv"), those of K, then those of V, if any;
        or the gradients of these ("grad"). With `rows`, of so many rows of the chunk in place of all."""
        if not self.exchanges(layer):
            return ()
        if rows is not None:
            whole = self.parts(layer, spec, kind)
            return tuple(part._replace(shape=(rows, part.shape[-1])) if part.by_token else part for part in whole)
        format = FORMATS[self.format_name(layer, spec, kind)]
        if not (spec.compressed and self.compresses(layer)):
            return (Part((self.batch, spec.tokens, self._d_kv), format),) * 2
        shapes = self.ranks.of_layer(layer)
        return tuple(part for shape in shapes for part in self._codec_parts(shape, spec.tokens, format))

    def theta(self, layer: int) -> TensorSpec:
        """The θ of K and V that a chunk's owner sends to the next chunk's owner (`compress.theta = "previous"`)."""
        numbers = sum(shape.groups * shape.parameters for shape in self.ranks.of_layer(layer))
        return TensorSpec((self.batch, numbers), torch.float32)

    def message(self, kind: str, layer: int, spec: PassSpec, rows: int | None = None) -> tuple[TensorSpec, ...] | None:
        """The tensors of a message of this kind about one chunk of one layer; None where there is no such message."""
        if kind == "done":
            return ()
        if kind in ("kv", "grad"):
            return self.tensors(layer, spec, kind, rows) or None
        return (self.theta(layer),) if self._hands_on and spec.compressed and self.compresses(layer) else None

    def rows_of(self, kind: str, spec: PassSpec, shapes: tuple[tuple[int, ...], ...]) -> int | None:
        """How many rows a message of these shapes claims to have, between 1 and all; None where it has all of them by
        its kind. How many it should have is known only to who has begun its pass."""
        if not self.documents or kind not in ("kv", "grad"):
            return None
        rows = shapes[0][0] if shapes and shapes[0] else 0
        return min(max(rows, 1), self.batch * spec.tokens)

    def codec_bytes(self, key: Key, rank: int) -> int:
        """Payload bytes of one full chunk of one layer's K, or V, at this rank."""
        parts = self._codec_parts(self.ranks[key]._replace(rank=rank), self._full.tokens, FORMATS[self._format])
        return sum(tensor.nbytes for part in parts for tensor in part.format.specs(part.shape))

    def tensors(self, layer: int, spec: PassSpec, kind: str = "kv", rows: int | None = None) -> tuple[TensorSpec, ...]:
        """The tensors that cross for one chunk of one layer, or for so many rows of it."""
        return tuple(tensor for part in self.parts(layer, spec, kind, rows) for tensor in part.format.specs(part.shape))

    def pack(self, layer: int, spec: PassSpec, payload: Payload, kind: str = "kv", draws: Draws = None) -> Packed:
        """The tensors that cross for a payload [..., B, …] of one chunk or of several; `draws` rounds at random."""
        pairs = zip(self.parts(layer, spec, kind), payload, strict=True)
        return tuple(tensor for part, x in pairs for tensor in part.format.pack(x, draws))

    def unpack(self, layer: int, spec: PassSpec, packed: Packed, kind: str = "kv") -> Payload:
        """The payload that every reader sees, from the tensors that crossed."""
        rest, payload = list(packed), []
        for part in self.parts(layer, spec, kind):
            count = len(part.format.specs(part.shape))
            payload.append(part.format.unpack(tuple(rest[:count]), part.shape[-1]))
            del rest[:count]
        return tuple(payload)

    def chunk_bytes(self, layer: int, spec: PassSpec, kind: str = "kv", rows: int | None = None) -> int:
        """Payload bytes of one chunk of one layer to one reader, or of the gradient that the reader returns; with
        `rows`, of so many rows of it."""
        return sum(tensor.nbytes for tensor in self.tensors(layer, spec, kind, rows))

    def theta_bytes(self, layer: int, spec: PassSpec) -> int:
        """Bytes of the θ that is handed on for one chunk of one layer, one way; 0 where none is."""
        return sum(tensor.nbytes for tensor in self.message("theta", layer, spec) or ())

    def uncompressed_bytes(self, spec: PassSpec, rows: int | None = None) -> int:
        """Bytes of one chunk of any layer, or of so many rows of it, with K and V whole: in bfloat16, as is the custom,
        and in float32 only where the whole run sends float32, so that no saving is claimed against a wider format than
        the run uses."""
        rows = self.batch * spec.tokens if rows is None else rows
        return sum(tensor.nbytes for tensor in self._plain.specs((2, rows, self._d_kv)))

    def _codec_parts(self, shape: CodecShape, tokens: int, format: Format) -> list[Part]:
        """Zcomp in this format, and θ, where there is one, in float32."""
        formats = (format, FORMATS["float32"])
        return [Part(*pair) for pair in zip(shape.payload_shapes(self.batch, tokens), formats, strict=False)]

    def _check_budget(self, budget_bytes_per_token: float) -> None:
        """Refuse a budget that is too small before the warm start, not after it."""
        least, greatest = self.rank_bounds
        least_bytes = sum(self.codec_bytes(key, least) for key in self.ranks.keys)
        if greatest < least or least_bytes > self.budget_bytes:
            tokens = self.batch * self._full.tokens
            raise ConfigError(
                f"compress.budget_bytes_per_token = {budget_bytes_per_token:g}: rank {least} in each "
                f"of {len(self.ranks.layers)} layers takes {least_bytes / tokens:.4g}; raise it, or compress fewer "
                f"layers"
            )


class StepBytes(NamedTuple):
    """Payload bytes that one node sends in the exchange of one pass, by kind of layer and direction."""

    compressed_forward: int
    compressed_backward: int
    dense_forward: int
    dense_backward: int

    @property
    def total(self) -> int:
        return sum(self)


def step_bytes(
    payload: PayloadFormat,
    assignment: Assignment,
    rank: int,
    spec: PassSpec,
    documents: Documents | None = None,
    relays: bool = False,
) -> StepBytes:
    """The bytes that `rank` sends in one training pass: payloads of its chunks to their readers, and with `relays` its
    part of others' payloads; gradients to owners. A step has `PayloadFormat.micro_batches` passes. Where attention
    stays within a document, `documents` are those of the pass.

    The test of the wire compares this with what the links counted, and allows no difference.
    """
    sent = [links[rank] for links in link_bytes(payload, assignment, spec, documents, relays)]
    return StepBytes(*(sum(row) for row in sent))


def link_bytes(
    payload: PayloadFormat,
    assignment: Assignment,
    spec: PassSpec,
    documents: Documents | None = None,
    relays: bool = False,
) -> list[list[list[int]]]:
    """The same by link: for each field of `StepBytes` the bytes of each sender (row) to each receiver (column)."""
    ranks, chunks = range(assignment.n_ranks), range(assignment.n_chunks)
    parts = [[[0] * len(ranks) for _ in ranks] for _ in StepBytes._fields]
    for layer in range(payload.layers):
        compressed = spec.compressed and payload.compresses(layer)
        forward, backward = parts[:2] if compressed else parts[2:]
        theta_bytes = payload.theta_bytes(layer, spec)
        for chunk in chunks if payload.exchanges(layer) else ():
            owner = assignment.owner(chunk)
            for sender, receiver, nbytes in _deliveries(payload, assignment, layer, chunk, spec, documents, relays):
                forward[sender][receiver] += nbytes
            for reader in assignment.readers_of(chunk):
                rows = _rows(documents, assignment, chunk, reader)
                backward[reader][owner] += 0 if rows == 0 else payload.chunk_bytes(layer, spec, "grad", rows)
            if chunk and (before := assignment.owner(chunk - 1)) != owner:
                forward[before][owner] += theta_bytes
                backward[owner][before] += theta_bytes
    return parts


def _deliveries(
    payload: PayloadFormat,
    assignment: Assignment,
    layer: int,
    chunk: int,
    spec: PassSpec,
    documents: Documents | None,
    relays: bool,
) -> Iterator[tuple[int, int, int]]:
    """(sender, receiver, bytes) of the messages that bring one chunk of one layer to its readers."""
    if documents is None:
        nbytes = payload.chunk_bytes(layer, spec)
        yield from routes_for(assignment, relays, nbytes).deliveries(chunk, nbytes)
        return
    for reader in assignment.readers_of(chunk):
        if rows := _rows(documents, assignment, chunk, reader):
            yield assignment.owner(chunk), reader, payload.chunk_bytes(layer, spec, "kv", rows)


def _rows(documents: Documents | None, assignment: Assignment, chunk: int, reader: int) -> int | None:
    """The rows of a chunk that a reader gets; None for all of them."""
    return None if documents is None else documents.rows(chunk, assignment.chunks(reader))
