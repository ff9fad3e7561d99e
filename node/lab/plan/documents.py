"""What is expected to be left of a step where attention stays within documents: rows that cross, and pairs of tokens.

The planner has no corpus. It takes the mean length of documents, L tokens (`data.document_tokens`), and lets each token
be a document's last with the same probability 1 / L, so that two tokens which are x apart are in one document with
probability (1 − 1/L)^x. Real lengths vary more: many documents are shorter, and a few longer, than this says. Sums over
the tokens of chunks are then in closed form.

Every message is reckoned with its expected rows, also where it is mostly empty and then not sent at all.

Shapes: C chunks, R ranks; n tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.assignment import Assignment
from node.config import Config

Array = npt.NDArray[np.float64]


class Expected(NamedTuple):
    """Shares of what there would be if a context were one document."""

    rows_CR: Array
    """Of a chunk's rows, those to which chunks of a rank attend."""
    pairs_CR: Array
    """Pairs of tokens in the attention of a rank's later chunks to a chunk; 1 is a whole chunk to a whole chunk."""
    own: float
    """Of the pairs within a chunk."""


def expected(config: Config, assignment: Assignment, tokens: int) -> Expected:
    """For chunks of `tokens` tokens; nothing is left out unless `data.document_tokens` says how long documents are."""
    last = 1.0 / config.data.document_tokens if config.data.document_tokens else 0.0
    stays = 1.0 - min(1.0, last)
    # x tokens before a border, and y after it, are of one document with probability stays^(x + y).
    before = (stays ** np.arange(1, tokens + 1)).sum()
    after = (stays ** np.arange(tokens)).sum()
    apart = np.arange(tokens)
    own = ((tokens - apart) * stays**apart).sum() / (tokens * (tokens + 1) / 2)
    shape = (assignment.n_chunks, assignment.n_ranks)
    rows_CR, pairs_CR = np.zeros(shape), np.zeros(shape)
    for rank in range(assignment.n_ranks):
        for chunk in range(assignment.n_chunks):
            gaps = [reader - chunk - 1 for reader in assignment.chunks(rank) if reader > chunk]
            if gaps:
                rows_CR[chunk, rank] = stays ** (min(gaps) * tokens) * before / tokens
                pairs_CR[chunk, rank] = sum(stays ** (gap * tokens) for gap in gaps) * before * after / tokens**2
    return Expected(rows_CR, pairs_CR, float(own))


def assumed(config: Config) -> list[str]:
    """What a plan assumes of documents, in words; nothing where attention spans the whole context."""
    if not config.data.document_masking:
        return []
    if not config.data.document_tokens:
        return [
            "documents: none ends within a context, since data.document_tokens = 0; where some do, less is sent and "
            "computed"
        ]
    return [
        f"documents: {config.data.document_tokens:g} tokens each in the mean, ending at random; every message has its "
        "expected size, and none is left out for being empty; memory is that of contexts of one document"
    ]
