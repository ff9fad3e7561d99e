"""Causal attention over chunks that arrive one by one.

Every own chunk attends to itself with its exact keys and values, all own chunks in one kernel call. Each earlier
chunk of the context, wherever it is owned, is then one more call for the queries of all later own chunks; the
caller makes these calls in whatever order chunks arrive. `merge` joins the blocks through their log-sum-exps in
chunk order, so that arrival does not change a bit of the result.

The backward is split among the autograd nodes so that each block's gradient is ready, and can leave for its owner,
before the next block's is computed: `_Merge` hands the gradient of the *merged* output to every block, and each
block uses the merged output and log-sum-exp (`node.model.kernels.block_backward`). The two are one function cut in
pieces: neither is a derivative on its own.

Shapes: C own chunks, B batch, H heads, n tokens of a chunk, D head_dim. Own chunks are in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from node.model.kernels import block_backward, block_forward

OWN = -1
"""Stands for the own-chunk block in merge order: it comes before every chunk index."""


@dataclass
class _Merged:
    """What the blocks of one attention share: the merged result, known only after all of them."""

    out_CBHnD: Tensor | None = None
    lse_CBHn: Tensor | None = None


@dataclass
class _Partial:
    first: int  # the block covers own chunks first, first + 1, …
    out_CBHnD: Tensor
    lse_CBHn: Tensor


@dataclass
class ChunkAttention:
    """One layer's attention of the own chunks, built up block by block.

    `q_CBHnD` is one set of queries for each block (`fan_out`), since their gradients must be added in chunk order,
    not in order of arrival.
    """

    blocks: int
    q: tuple[Tensor, ...] = field(default=(), init=False)
    _merged: _Merged = field(default_factory=_Merged, init=False)
    _partials: dict[int, _Partial] = field(default_factory=dict, init=False)

    def queries(self, q_CBHnD: Tensor) -> None:
        """Set the queries of the own chunks."""
        self.q = _FanOut.apply(q_CBHnD, self.blocks) if self.blocks > 1 else (q_CBHnD,)

    def attend_own(self, k_CBHnD: Tensor, v_CBHnD: Tensor, anchor: Tensor) -> None:
        """Each own chunk to itself. `anchor` ties the exchange's backward to this attention (`node.exchange`)."""
        out, lse = _OwnBlock.apply(self.q[0], k_CBHnD, v_CBHnD, anchor, self._merged)
        self._partials[OWN] = _Partial(0, out, lse)

    def attend_chunk(self, chunk: int, slot: int, first: int, k_BHnD: Tensor, v_BHnD: Tensor) -> None:
        """Own chunks first, first + 1, … to an earlier chunk. `slot` (1 … blocks − 1) is the chunk's place in order."""
        out, lse = _ChunkBlock.apply(self.q[slot], k_BHnD, v_BHnD, first, self._merged)
        self._partials[chunk] = _Partial(first, out, lse)

    def merge(self) -> Tensor:
        """The attention's output [C, B, H, n, D], once every block has been attended."""
        assert len(self._partials) == self.blocks
        partials = [self._partials[chunk] for chunk in sorted(self._partials)]
        tensors = [tensor for partial in partials for tensor in (partial.out_CBHnD, partial.lse_CBHn)]
        merged: Tensor = _Merge.apply(self._merged, [partial.first for partial in partials], *tensors)
        return merged


class _FanOut(Function):
    """Copies (views) of a tensor whose gradients are added in order of index, not of arrival."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(copies))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        for grad in grads[1:]:
            total += grad
        return total, None


class _OwnBlock(Function):
    @staticmethod
    def forward(
        ctx: Any, q_CBHnD: Tensor, k_CBHnD: Tensor, v_CBHnD: Tensor, anchor: Tensor, merged: _Merged
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_CBHnD, k_CBHnD, v_CBHnD, anchor)
        ctx.merged = merged
        out, lse = block_forward(_fold(q_CBHnD), _fold(k_CBHnD), _fold(v_CBHnD), causal=True)
        return out.view_as(q_CBHnD), lse.view(q_CBHnD.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v, anchor = ctx.saved_tensors
        out, lse = ctx.merged.out_CBHnD, ctx.merged.lse_CBHn
        grads = block_backward(_fold(dout), _fold(q), _fold(k), _fold(v), _fold(out), _fold(lse), causal=True)
        dq, dk, dv = (grad.view_as(q) for grad in grads)
        return dq, dk, dv, torch.zeros_like(anchor), None


class _ChunkBlock(Function):
    @staticmethod
    def forward(
        ctx: Any, q_CBHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, first: int, merged: _Merged
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_CBHnD, k_BHnD, v_BHnD)
        ctx.merged, ctx.first = merged, first
        out, lse = block_forward(_join(q_CBHnD[first:]), k_BHnD, v_BHnD, causal=False)
        return _part(out, q_CBHnD.shape[0] - first), _part(lse, q_CBHnD.shape[0] - first)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        first = ctx.first
        out, lse = ctx.merged.out_CBHnD[first:], ctx.merged.lse_CBHn[first:]
        dq_part, dk, dv = block_backward(_join(dout), _join(q[first:]), k, v, _join(out), _join(lse), causal=False)
        dq = torch.zeros_like(q)
        dq[first:] = _part(dq_part, q.shape[0] - first)
        return dq, dk, dv, None, None


class _Merge(Function):
    """out = Σ_j exp(lse_j − lse) out_j with lse = log Σ_j exp(lse_j), in the order of the arguments."""

    @staticmethod
    def forward(ctx: Any, merged: _Merged, firsts: list[int], *tensors: Tensor) -> Tensor:
        outs, lses = tensors[::2], tensors[1::2]
        out, lse = outs[0].to(lses[0].dtype, copy=True), lses[0].clone()
        for first, out_j, lse_j in zip(firsts[1:], outs[1:], lses[1:], strict=True):
            total = torch.logaddexp(lse[first:], lse_j)
            out[first:] *= torch.exp(lse[first:] - total).unsqueeze(-1)
            out[first:] += torch.exp(lse_j - total).unsqueeze(-1) * out_j
            lse[first:] = total
        merged.out_CBHnD, merged.lse_CBHn = out.to(outs[0].dtype), lse
        ctx.firsts = firsts
        return merged.out_CBHnD.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for first in ctx.firsts:
            grads += [dout[first:], None]
        return None, None, *grads


def _fold(x_CB: Tensor) -> Tensor:
    """[C, B, …] to [C·B, …]: every own chunk as an entry of the batch."""
    return x_CB.flatten(0, 1)


def _join(x_CBHn: Tensor) -> Tensor:
    """[C, B, H, n, …] to [B, H, C·n, …]: the queries of several chunks as one run."""
    return x_CBHn.movedim(0, 2).flatten(2, 3)


def _part(x_BHt: Tensor, chunks: int) -> Tensor:
    """Back from `_join`."""
    parts_BHCn: Tensor = x_BHt.unflatten(2, (chunks, -1))
    return parts_BHCn.movedim(2, 0)
