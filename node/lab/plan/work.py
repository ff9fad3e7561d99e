"""The work of one pass by stage of a layer, counted and not timed; `node.lab.plan.costs` gives its duration.

A step has one pass, or several of equal work (`train.micro_batches`).

Stages are those of `node.model.exchanged`, cut where messages are sent or awaited:

    before   norm, K and V projections, encode; then the payloads leave
    own      Q projection, RoPE, each own chunk to itself; payloads travel
    block    one earlier chunk: decode, RoPE, the later own chunks' queries to it
    after    merge, output projection, feed-forward

The backward mirrors this: after, the blocks (a gradient leaves after each), own, then waiting for the gradients of the
readers, then before. No activation is computed twice, except the scores inside the fused attention kernel; with
`run.recompute`, a layer's backward begins with its forward once more, without attention (`node.model.recompute`).

The model's FLOPs are counted by `node.measure.flops`, those of compression here. Where attention stays within
documents, `node.lab.plan.documents` says what is expected to be left of attention and of payloads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.assignment import Assignment
from netem.config import user_path
from node.config import Config, ModelConfig
from node.config.pretrained import llama_file
from node.config.stages import stage_layers
from node.data.tokenizers import make_tokenizer
from node.exchange.passes import PassSpec
from node.exchange.routes import routes_for
from node.lab.plan.documents import expected
from node.measure.flops import ATTENTION_BACKWARD, MATRIX_BACKWARD, chunk_flops, head_flops
from node.subspace.ranks import rank_table
from node.train.head import RUN_TOKENS

Array = npt.NDArray[np.float64]

VOCABULARY = {"gpt2": 50_257, "gpt2-2048": 2048, "bytes": 257}


def vocabulary_size(config: Config) -> int:
    """How many tokens the model embeds."""
    if config.model.init:
        return llama_file(user_path(config.model.init, "model.init")).vocab_size
    return VOCABULARY.get(config.data.tokenizer) or make_tokenizer(config.data.tokenizer).vocab_size


class Work(NamedTuple):
    """An amount of work, [R] or [C, R]: FLOPs of matrix products, numbers that pass all other operations (norms,
    activations, softmax, optimizer), stages or blocks begun, messages sent or received, and the payload bytes in them
    that the node packs, copies and unpacks."""

    flops: Array
    elements: Array
    calls: Array
    messages: Array
    nbytes: Array

    def total(self) -> Work:
        """The sum over all chunks: [R]."""
        return Work(*(part.sum(0) if part.ndim == 2 else part for part in self))

    def without_messages(self) -> Work:
        """The same without what sending and receiving cost."""
        return self._replace(messages=0 * self.messages, nbytes=0 * self.nbytes)

    def __add__(self, other: object) -> Work:
        if not isinstance(other, tuple):
            return NotImplemented
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Stages(NamedTuple):
    """One layer in one direction: `block` is [C, R], the others [R]."""

    before: Work
    own: Work
    block: Work
    after: Work


class LayerWork(NamedTuple):
    """One layer, both directions."""

    forward: Stages
    backward: Stages


class Reading(NamedTuple):
    """Which ranks attend to which chunks: [C, R] all three."""

    queries: Array
    """The number of chunks of rank r after chunk c, all of which attend to it."""
    remote: npt.NDArray[np.bool_]
    """Rank r reads chunk c from another node."""
    local: npt.NDArray[np.bool_]
    """Rank r owns chunk c and also later chunks, which read it through the codec."""


def reading(assignment: Assignment, exchanges: bool = True) -> Reading:
    """Which ranks read which chunks; none where a layer does not exchange."""
    shape = (assignment.n_chunks, assignment.n_ranks)
    queries, owned = np.zeros(shape), np.zeros(shape, dtype=bool)
    for rank in range(assignment.n_ranks):
        own = np.array(assignment.chunks(rank))
        owned[own, rank] = True
        queries[:, rank] = (own[None, :] > np.arange(shape[0])[:, None]).sum(1) if exchanges else 0
    return Reading(queries, (queries > 0) & ~owned, (queries > 0) & owned)


def pass_contexts(config: Config) -> int:
    """Contexts in one pass."""
    return config.train.batch // config.train.micro_batches


def layer_work(config: Config, layer: int, spec: PassSpec, payload_bytes: float, grad_bytes: float) -> LayerWork:
    """The work of one layer in one pass on every rank, for chunks of `spec.tokens` tokens; `payload_bytes` is the
    payload of one chunk, `grad_bytes` its gradient's, both 0 where the layer sends nothing."""
    model, assignment = config.model, config.assignment()
    tokens = float(pass_contexts(config) * spec.tokens)
    query_width, d_kv = model.heads * model.head_size, model.d_kv
    who = reading(assignment, exchanges=layer >= config.local_layers)
    own = np.array([len(assignment.chunks(rank)) for rank in range(assignment.n_ranks)], dtype=float)
    sent = np.array([sum(map(len, _readers(assignment, rank))) for rank in range(assignment.n_ranks)], dtype=float)
    sent *= float(layer >= config.local_layers)
    codec = 2 * tokens * _codec_width(config, layer, spec)
    chunk = chunk_flops(model, spec.tokens, pass_contexts(config))
    attends, remote = (who.remote | who.local).astype(float), who.remote.astype(float)
    left = expected(config, assignment, spec.tokens)
    queries, received = left.pairs_CR * attends, left.rows_CR * remote
    out = [(left.rows_CR * who.remote)[list(assignment.chunks(rank))].sum() for rank in range(assignment.n_ranks)]
    sent_rows = np.array(out)

    def stages(matrix: float, attention: float, nbytes: float) -> Stages:
        """Forward with factors of 1; backward with those of the backward. `nbytes` is the size of a message."""
        pairs = attention * chunk.pair
        before = chunk.key_value + codec
        one = np.ones_like(own)
        return Stages(
            Work(matrix * before * own, tokens * (2 * model.d_model + 2 * d_kv) * own, one, sent, nbytes * sent_rows),
            Work(
                (matrix * chunk.query + pairs / 2 * left.own) * own,
                tokens * (3 * query_width + spec.tokens * model.heads / 2 * left.own) * own,
                one,
                0 * one,
                0 * one,
            ),
            Work(
                matrix * codec * attends + pairs * queries,
                tokens * (2 * query_width * attends + (query_width + spec.tokens * model.heads) * queries),
                attends,
                remote,
                nbytes * received,
            ),
            Work(
                matrix * chunk.after * own,
                tokens * (query_width + 4 * model.d_model + 3 * model.ffn_dim) * own,
                one,
                0 * one,
                0 * one,
            ),
        )

    forward = stages(1.0, 1.0, payload_bytes)
    if config.coordinator.relays and payload_bytes:
        forward = _relayed(forward, assignment, round(payload_bytes))
    backward = stages(MATRIX_BACKWARD, ATTENTION_BACKWARD, grad_bytes)
    if config.run.recompute:
        down = 2 * tokens * model.ffn_dim * model.d_model  # whose output no backward needs
        matrices = chunk.key_value + codec + chunk.query + chunk.after - down
        again = Work(
            matrices * own + (codec * attends).sum(0),
            tokens * (6 * model.d_model + 2 * d_kv + 4 * query_width + 3 * model.ffn_dim) * own,
            np.ones_like(own),
            0 * own,
            0 * own,
        )
        backward = backward._replace(after=backward.after + again)
    return LayerWork(forward, backward)


def _relayed(forward: Stages, assignment: Assignment, nbytes: int) -> Stages:
    """The same with the messages of payloads that readers pass on: each rank sends those of its part of all ways, and
    receives them in pieces. What is passed on costs a node as much as what it sends itself."""
    routes = routes_for(assignment, True, nbytes)
    messages, sent_bytes = np.zeros(assignment.n_ranks), np.zeros(assignment.n_ranks)
    for chunk in range(assignment.n_chunks):
        for sender, _, part_bytes in routes.deliveries(chunk, nbytes):
            messages[sender] += 1
            sent_bytes[sender] += part_bytes
    pieces_C1 = np.array([[routes.pieces(chunk)] for chunk in range(assignment.n_chunks)], dtype=float)
    block = forward.block._replace(messages=forward.block.messages * pieces_C1)
    return forward._replace(before=forward.before._replace(messages=messages, nbytes=sent_bytes), block=block)


def head_work(config: Config, spec: PassSpec) -> tuple[Work, Work]:
    """The output head and the loss of one pass, forward and backward, on every rank.

    Long runs of tokens compute their gradients in the forward, so that no logits are kept (`node.train.head`).
    """
    assignment = config.assignment()
    own = np.array([len(assignment.chunks(rank)) for rank in range(assignment.n_ranks)], dtype=float)
    tokens, vocabulary = pass_contexts(config) * spec.tokens * own, vocabulary_size(config)
    flops, one = head_flops(config.model, vocabulary) * tokens, np.ones_like(own)
    forward = Work(flops, 3.0 * tokens * vocabulary, one, 0 * one, 0 * one)
    backward = forward._replace(flops=MATRIX_BACKWARD * flops)
    at_once = tokens > RUN_TOKENS
    early, late = (Work(*(np.where(which, part, 0.0) for part in backward)) for which in (at_once, ~at_once))
    return forward + early, late


def optimizer_work(config: Config, held: int) -> Work:
    """Clipping and AdamW of `held` parameters on every rank: each parameter, its gradient and both moments pass several
    operations. The gradients of several passes are added before."""
    one = np.ones(config.assignment().n_ranks)
    operations = 10.0 + (config.train.micro_batches - 1)
    return Work(0 * one, operations * held * one, one, 0 * one, 0 * one)


class Held(NamedTuple):
    """Parameters of one pipeline stage."""

    matrices: tuple[tuple[int, int], ...]
    """(rows, width) of each matrix and vector of the decoder, whose rows the shards of the stage share out."""
    copied: int
    """Parameters of learned subspaces, which each shard has whole."""

    @property
    def dealt(self) -> int:
        """Parameters of the decoder."""
        return sum(rows * width for rows, width in self.matrices)

    def of_shard(self, shards: int) -> int:
        """What the fullest shard has: FSDP2 gives every one as many rows, and the last ones fewer or none."""
        return sum(-(-rows // shards) * width for rows, width in self.matrices) + self.copied


def parameters(config: Config) -> int:
    """Parameters of the decoder and of learned subspaces, without the heads ψ (d_kv numbers each) and without learned
    subspaces whose ranks a run chooses for a budget."""
    return sum(held.dealt + held.copied for held in stage_parameters(config, 1))


def stage_parameters(config: Config, stages: int) -> list[Held]:
    """The same by stage: the embedding is in the first, the last norm and the head in the last."""
    model, vocabulary = config.model, vocabulary_size(config)
    found = []
    for stage, layers in enumerate(stage_layers(model.layers, stages)):
        matrices = _layer_matrices(model) * len(layers)
        if stage == 0:
            matrices += ((vocabulary, model.d_model),)
        if stage == stages - 1:
            matrices += ((model.d_model, 1), *(() if model.tied else ((vocabulary, model.d_model),)))
        found.append(Held(matrices, sum(_learned(config, index) for index in layers)))
    return found


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one layer of the decoder."""
    return Held(_layer_matrices(model), 0).dealt


def _layer_matrices(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(rows, width) of Q, K, V and output projection, gate, up and down of the feed-forward, and both norms."""
    width, queries, inner = model.d_model, model.heads * model.head_size, model.ffn_dim
    attention = ((queries, width), (model.d_kv, width), (model.d_kv, width), (width, queries))
    return (*attention, (inner, width), (inner, width), (width, inner), (width, 1), (width, 1))


def _learned(config: Config, layer: int) -> int:
    """Parameters of a layer's learned subspaces."""
    if config.compress.subspace != "learned" or layer not in config.compressed:
        return 0
    shapes = rank_table(config.model, config.compress).of_layer(layer)
    return sum(2 * shape.groups * shape.width * shape.rank for shape in shapes)


def _codec_width(config: Config, layer: int, spec: PassSpec) -> float:
    """Multiply-adds per token of encoding, or of decoding, K and V of one layer."""
    if not spec.compressed or layer not in config.compressed:
        return 0.0
    ranks = rank_table(config.model, config.compress)
    return float(sum(shape.groups * shape.width * shape.rank for shape in ranks.of_layer(layer)))


def _readers(assignment: Assignment, rank: int) -> list[tuple[int, ...]]:
    return [assignment.readers_of(chunk) for chunk in assignment.chunks(rank)]
