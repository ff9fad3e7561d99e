"""Causal attention over chunks that arrive one by one.

Every own chunk attends to itself, all own chunks in one kernel call. Own chunks then attend to the own chunks before
them, as decoded from their payload, and to each earlier chunk of another node in one more call for the queries of all
later own chunks; the caller makes these calls in the order in which chunks arrive. `merge` joins the blocks through
their log-sum-exps in chunk order, so that the order of arrival does not change a bit of the result.

The backward is split among the autograd nodes so that each block's gradient is ready, and can leave for its owner,
before the next block's is computed: `_Merge` hands the gradient of the *merged* output to every block, and each
block uses the merged output and log-sum-exp (`node.model.kernels.block_backward`). The two are one function cut in
pieces: neither is a derivative on its own.

A layer that is computed again for its backward (`node.model.recompute`) knows the merged result from the forward. Its
backward needs no more of the attention than that and the queries, keys and values, so the blocks then compute nothing.

Where attention stays within a document, `grid` says which rectangles of each block are computed
(`node.model.rectangles`); without it a block is computed whole.

Shapes: C own chunks, B batch, H query heads, G key/value heads, n tokens of a chunk, D head_dim. Own chunks are in
ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from node.model.kernels import block_forward, gradients_by_head, sum_of_heads
from node.model.rectangles import Grid, Rectangles, attend, attend_backward

OWN, LOCAL = -2, -1
"""The blocks of each own chunk to itself, and of own chunks to each other. They come before those of other nodes'
chunks in the order of merging."""


@dataclass
class Merged:
    """What the blocks of one attention share: the merged result. In a forward it is known after all of them; where a
    layer is computed again, from the start."""

    out_CBHnD: Tensor | None = None
    lse_CBHn: Tensor | None = None


class ChunkAttention:
    """One layer's attention of the own chunks, built up block by block.

    `far` maps each earlier chunk of another node to the place of the first own chunk after it; `local` says whether own
    chunks attend to each other; `merged` is the result where it is already known; `grid` keeps attention within
    documents.
    """

    def __init__(
        self,
        q_CBHnD: Tensor,
        far: Mapping[int, int],
        local: bool,
        merged: Merged | None = None,
        grid: Grid | None = None,
    ) -> None:
        blocks = {OWN: 0} | ({LOCAL: 1} if local else {}) | dict(far)
        self._firsts = {block: blocks[block] for block in sorted(blocks)}
        # Each block has its own view of the queries: gradients must be added in chunk order, not in order of arrival.
        parts = _FanOut.apply(q_CBHnD, tuple(self._firsts.values()))
        self._q = dict(zip(self._firsts, parts, strict=True))
        self.merged = Merged() if merged is None else merged
        self._grid = grid or {}
        self._partials: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_own(self, k_CBGnD: Tensor, v_CBGnD: Tensor, anchor: Tensor) -> None:
        """Each own chunk to itself. `anchor` ties the exchange's backward to this attention (`node.exchange`)."""
        self._partials[OWN] = _OwnBlock.apply(self._q[OWN], k_CBGnD, v_CBGnD, anchor, self.merged, self._grid.get(OWN))

    def attend_local(self, k_CBGnD: Tensor, v_CBGnD: Tensor) -> None:
        """Own chunks to the own ones before them: the keys and values of all own chunks but the last."""
        self._partials[LOCAL] = _LocalBlock.apply(self._q[LOCAL], k_CBGnD, v_CBGnD, self.merged, self._grid.get(LOCAL))

    def attend_far(self, chunk: int, k_BGnD: Tensor, v_BGnD: Tensor) -> None:
        """The later own chunks to a chunk of another node."""
        self._partials[chunk] = _FarBlock.apply(
            self._q[chunk], k_BGnD, v_BGnD, self._firsts[chunk], self.merged, self._grid.get(chunk)
        )

    def merge(self) -> Tensor:
        """The attention's output [C, B, H, n, D], once every block has been attended."""
        assert self._partials.keys() == self._firsts.keys()
        tensors = [tensor for block in self._firsts for tensor in self._partials[block]]
        merged: Tensor = _Merge.apply(self.merged, tuple(self._firsts.values()), *tensors)
        return merged


class _FanOut(Function):
    """The chunks of a tensor from each of `firsts` on (the first of them is 0), as views whose gradients are added in
    order of index, not of arrival."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, firsts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.firsts = firsts
        return tuple(x_C[first:] for first in firsts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        for first, grad in zip(ctx.firsts[1:], grads[1:], strict=True):
            total[first:] += grad
        return total, None


class _OwnBlock(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_CBHnD: Tensor,
        k_CBGnD: Tensor,
        v_CBGnD: Tensor,
        anchor: Tensor,
        merged: Merged,
        rectangles: Rectangles | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_CBHnD, k_CBGnD, v_CBGnD, anchor)
        ctx.merged, ctx.rectangles = merged, rectangles
        if merged.out_CBHnD is not None:
            return _nothing(q_CBHnD)
        out, lse = attend(_fold(q_CBHnD), _fold(k_CBGnD), _fold(v_CBGnD), True, rectangles)
        return out.view_as(q_CBHnD), lse.view(q_CBHnD.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v, anchor = ctx.saved_tensors
        out, lse = ctx.merged.out_CBHnD, ctx.merged.lse_CBHn
        grads = attend_backward(
            *(_fold(dout), _fold(q), _fold(k), _fold(v), _fold(out), _fold(lse)), True, ctx.rectangles
        )
        dq, dk, dv = (grad.view_as(x) for grad, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv, torch.zeros_like(anchor), None, None


class _LocalBlock(Function):
    """The queries are those of all own chunks but the first; each sees one chunk more than the one before it."""

    @staticmethod
    def forward(
        ctx: Any, q_CBHnD: Tensor, k_CBGnD: Tensor, v_CBGnD: Tensor, merged: Merged, rectangles: Rectangles | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_CBHnD, k_CBGnD, v_CBGnD)
        ctx.merged, ctx.rectangles = merged, rectangles
        if merged.out_CBHnD is not None:
            return _nothing(q_CBHnD)
        k_BGtD, v_BGtD, tokens = _join(k_CBGnD), _join(v_CBGnD), k_CBGnD.shape[-2]
        if rectangles is not None:
            out, lse = attend(_join(q_CBHnD), k_BGtD, v_BGtD, False, rectangles)
            return _part(out, len(q_CBHnD)), _part(lse, len(q_CBHnD))
        parts = [
            block_forward(q, k_BGtD[:, :, :seen], v_BGtD[:, :, :seen], causal=False)
            for q, seen in zip(q_CBHnD, _counts(tokens, len(q_CBHnD)), strict=True)
        ]
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        out, lse = ctx.merged.out_CBHnD[1:], ctx.merged.lse_CBHn[1:]
        if ctx.rectangles is not None:
            grads = attend_backward(
                *(_join(dout), _join(q), _join(k), _join(v), _join(out), _join(lse)), False, ctx.rectangles
            )
            return *(_part(grad, len(q)) for grad in grads), None, None
        k_BGtD, v_BGtD = _join(k), _join(v)
        dq, (batch, kv_heads, tokens, _) = torch.empty_like(q), k_BGtD.shape
        dk, dv = (q.new_zeros(batch, q.shape[2], tokens, q.shape[-1]) for _ in "kv")  # of each query head
        for place, seen in enumerate(_counts(k.shape[-2], len(q))):
            keys, values = k_BGtD[:, :, :seen], v_BGtD[:, :, :seen]
            dq[place], dk_part, dv_part = gradients_by_head(
                dout[place], q[place], keys, values, out[place], lse[place], causal=False
            )
            dk[:, :, :seen] += dk_part
            dv[:, :, :seen] += dv_part
        return dq, _part(sum_of_heads(dk, kv_heads), len(k)), _part(sum_of_heads(dv, kv_heads), len(v)), None, None


class _FarBlock(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_CBHnD: Tensor,
        k_BGnD: Tensor,
        v_BGnD: Tensor,
        first: int,
        merged: Merged,
        rectangles: Rectangles | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_CBHnD, k_BGnD, v_BGnD)
        ctx.merged, ctx.first, ctx.rectangles = merged, first, rectangles
        if merged.out_CBHnD is not None:
            return _nothing(q_CBHnD)
        out, lse = attend(_join(q_CBHnD), k_BGnD, v_BGnD, False, rectangles)
        return _part(out, len(q_CBHnD)), _part(lse, len(q_CBHnD))

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        out, lse = ctx.merged.out_CBHnD[ctx.first :], ctx.merged.lse_CBHn[ctx.first :]
        dq, dk, dv = attend_backward(_join(dout), _join(q), k, v, _join(out), _join(lse), False, ctx.rectangles)
        return _part(dq, len(q)), dk, dv, None, None, None


class _Merge(Function):
    """out = Σ_j exp(lse_j − lse) out_j with lse = log Σ_j exp(lse_j), in the order of the arguments."""

    @staticmethod
    def forward(ctx: Any, merged: Merged, firsts: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.firsts = firsts
        if merged.out_CBHnD is not None:
            return merged.out_CBHnD.detach()
        outs, lses = tensors[::2], tensors[1::2]
        out, lse = outs[0].to(lses[0].dtype, copy=True), lses[0].clone()
        for first, out_j, lse_j in zip(firsts[1:], outs[1:], lses[1:], strict=True):
            total = torch.logaddexp(lse[first:], lse_j)
            out[first:] *= torch.exp(lse[first:] - total).unsqueeze(-1)
            out[first:] += torch.exp(lse_j - total).unsqueeze(-1) * out_j
            lse[first:] = total
        out = out.to(outs[0].dtype)
        # Another tensor of the same memory: the one that is returned holds the graph, which holds `merged`.
        merged.out_CBHnD, merged.lse_CBHn = out.detach(), lse
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for first in ctx.firsts:
            grads += [dout[first:], None]
        return None, None, *grads


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """In place of a block's output and log-sum-exp where the merged result is known."""
    return x.new_empty(0), x.new_empty(0)


def _counts(tokens: int, chunks: int) -> range:
    """How many earlier tokens each chunk sees; the first of them sees one chunk."""
    return range(tokens, tokens * chunks + 1, tokens)


def _fold(x_CB: Tensor) -> Tensor:
    """[C, B, …] to [C·B, …]: every own chunk as an entry of the batch."""
    return x_CB.flatten(0, 1)


def _join(x_CBHn: Tensor) -> Tensor:
    """[C, B, H, n, …] to [B, H, C·n, …]: several chunks as one run."""
    return x_CBHn.movedim(0, 2).flatten(2, 3)


def _part(x_BHt: Tensor, chunks: int) -> Tensor:
    """Back from `_join`."""
    parts_BHCn: Tensor = x_BHt.unflatten(2, (chunks, -1))
    return parts_BHCn.movedim(2, 0)
