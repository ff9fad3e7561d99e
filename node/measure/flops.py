"""FLOPs of the model in a training step, counted: the one formula of the planner and of a run's MFU.

A matrix product of [a, b] by [b, c] counts 2abc FLOPs forward and twice that backward. Attention of t queries to s
keys counts 4tsHD, half of it where causal; backward 2.5 times that (five products in place of two, FlashAttention-2).
What compression adds is not the model's: the planner counts it beside this (`node.lab.plan.work`), and an MFU does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from node.config import CompressConfig, ModelConfig
from node.exchange.passes import PassSpec

ATTENTION_BACKWARD = 2.5
MATRIX_BACKWARD = 2.0


class ChunkFlops(NamedTuple):
    """FLOPs of one layer's forward for one chunk, all contexts of the batch."""

    key_value: float
    """The projections to K and V."""
    query: float
    """The projection to Q."""
    after: float
    """Output projection and feed-forward."""
    pair: float
    """Attention of the chunk's queries to all keys of one other chunk. To its own, causal, it is half of that."""


def chunk_flops(model: ModelConfig, chunk_tokens: int, batch: int) -> ChunkFlops:
    """One layer's forward for one chunk of `chunk_tokens` tokens in each of `batch` contexts."""
    tokens, query_width = float(batch * chunk_tokens), model.heads * model.head_size
    return ChunkFlops(
        key_value=2 * tokens * model.d_model * 2 * model.d_kv,
        query=2 * tokens * model.d_model * query_width,
        after=2 * tokens * (query_width + 3 * model.ffn_dim) * model.d_model,
        pair=4 * tokens * chunk_tokens * query_width,
    )


def head_flops(model: ModelConfig, vocabulary: int) -> float:
    """The output head's forward for one token."""
    return 2.0 * model.d_model * vocabulary


def step_flops(
    model: ModelConfig, compress: CompressConfig, batch: int, own: Sequence[int], spec: PassSpec, vocabulary: int
) -> float:
    """The model's FLOPs in a training step, forward and backward, of a node that owns the chunks `own`.

    `batch` is the number of contexts in the step, and `vocabulary` that of rows of the output head. Layers that see no
    other chunk count no attention to others.
    """
    chunk = chunk_flops(model, spec.tokens, batch)
    matrices = len(own) * model.layers * (chunk.key_value + chunk.query + chunk.after)
    matrices += len(own) * batch * spec.tokens * head_flops(model, vocabulary)
    far_layers = model.layers - compress.local_of(model.layers)
    attention = chunk.pair * (model.layers * len(own) / 2 + far_layers * sum(own))  # chunk c has c chunks before it
    return matrices * (1 + MATRIX_BACKWARD) + attention * (1 + ATTENTION_BACKWARD)
