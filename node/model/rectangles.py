"""Attention where a token attends to its own document only: a block is cut into rectangles, and no mask is needed.

A document is one run of tokens, so what the queries of one context see of a run of keys is one rectangle, or nothing;
within a chunk it is one causal square for each document (`node.exchange.documents`). Each rectangle is a call of the
same kernel on slices (`node.model.kernels`), and what lies outside all of them is never computed: there the output is
0 and the log-sum-exp −∞, so that merging adds exactly nothing, and gradients are exactly 0.

Shapes: B entries (contexts, or own chunks of each), H query heads, G key/value heads, T queries, S keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node.exchange.documents import Documents
from node.model.kernels import HALF, block_backward, block_forward


class Rectangle(NamedTuple):
    """The queries of one entry that attend to these keys of it: all to all, or causally, where both are one run."""

    entry: int
    queries: slice
    keys: slice


Rectangles = Sequence[Rectangle]
Grid = Mapping[int, Rectangles]
"""The rectangles of each block, by its name in `node.model.attention`."""


def attend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, rectangles: Rectangles | None
) -> tuple[Tensor, Tensor]:
    """Attention of one block, (out_BHTD, lse_BHT), within `rectangles`, or whole where they are None."""
    if rectangles is None:
        return block_forward(q_BHTD, k_BGSD, v_BGSD, causal)
    out_BHTD = torch.zeros_like(q_BHTD)
    dtype = torch.float32 if q_BHTD.dtype in HALF else q_BHTD.dtype
    lse_BHT = torch.full(q_BHTD.shape[:-1], float("-inf"), dtype=dtype, device=q_BHTD.device)
    for entry, queries, keys in rectangles:
        of = slice(entry, entry + 1)
        q, k, v = q_BHTD[of, :, queries], k_BGSD[of, :, keys], v_BGSD[of, :, keys]
        out_BHTD[of, :, queries], lse_BHT[of, :, queries] = block_forward(q, k, v, causal)
    return out_BHTD, lse_BHT


def attend_backward(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
    rectangles: Rectangles | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq_BHTD, dk_BGSD, dv_BGSD) of one block, given the merged `out` and `lse` of all blocks."""
    if rectangles is None:
        return block_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, causal)
    dq, dk, dv = (torch.zeros_like(x) for x in (q_BHTD, k_BGSD, v_BGSD))
    for entry, queries, keys in rectangles:
        of = slice(entry, entry + 1)
        parts = block_backward(
            dout_BHTD[of, :, queries],
            q_BHTD[of, :, queries],
            k_BGSD[of, :, keys],
            v_BGSD[of, :, keys],
            out_BHTD[of, :, queries],
            lse_BHT[of, :, queries].contiguous(),
            causal,
        )
        dq[of, :, queries] += parts[0]
        dk[of, :, keys] += parts[1]
        dv[of, :, keys] += parts[2]
    return dq, dk, dv


def own_squares(documents: Documents, own: Sequence[int], batch: int) -> list[Rectangle]:
    """Each own chunk to itself: the entries are [C·B], queries and keys the chunk's tokens."""
    return [
        Rectangle(place * batch + run.context, slice(run.begin, run.end), slice(run.begin, run.end))
        for place, chunk in enumerate(own)
        for run in documents.parts(chunk)
    ]


def local_rectangles(documents: Documents, own: Sequence[int], batch: int) -> list[Rectangle]:
    """Own chunks to the own ones before them: the entries are [B], the queries those of all own chunks but the first,
    one after the other, the keys those of all but the last."""
    tokens, found = documents.tokens, []
    for place, chunk in enumerate(own[1:], start=1):
        for context in range(batch):
            head, before = documents.head(chunk, context), documents.before(chunk, context, own[:place])
            if head and before:
                first, seen = (place - 1) * tokens, place * tokens
                found.append(Rectangle(context, slice(first, first + head), slice(seen - before, seen)))
    return found


def far_rectangles(documents: Documents, chunk: int, later: Sequence[int]) -> list[Rectangle]:
    """The own chunks after `chunk`, one after the other, to a chunk of another node: the entries are [B]."""
    return [
        Rectangle(run.context, slice(0, documents.seen_by(chunk, run.context, later)), slice(run.begin, run.end))
        for run in documents.tails(chunk, later)
    ]
