"""Context parallelism as others do it: all-gather of keys and values, and Ulysses, over torch.distributed.

Both are written plainly: a collective, the attention, and in the backward the collective's transpose. Each attention
takes the place of a plain Llama's (`node.model.llama`). A rank's part of the loss gives its part of the gradient; the
sum over ranks is that of one process.

The all-gather's transpose is a reduce-scatter. It is made here as an all-to-all and a sum in float32, which sends as
little as a reduce-scatter can, (N − 1)/N of the tensor.

Shapes: N ranks, A all chunks, C own chunks, B batch, H query heads, G key/value heads, n tokens of a chunk, T tokens
of the context, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from node.config import ModelConfig
from node.model.kernels import block_backward, block_forward
from node.model.llama import Attention, Step


class Layout(NamedTuple):
    """The chunks of each rank, in ascending order."""

    own_R: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> list[int]:
        """All chunks, in the order in which a gather brings them."""
        return [chunk for own in self.own_R for chunk in own]


def contiguous(ranks: int) -> Layout:
    """One chunk for each rank."""
    return Layout(tuple((rank,) for rank in range(ranks)))


def zigzag(ranks: int) -> Layout:
    """An early and a late chunk for each rank, which balances the causal triangle."""
    return Layout(tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)))


class GatheredAttention(Attention):
    """Own queries against the keys and values of all ranks, which an all-gather brings."""

    def __init__(self, model: ModelConfig, layout: Layout, rank: int, wire: torch.dtype) -> None:
        super().__init__(model)
        self._layout, self._rank, self._wire = layout, rank, wire

    def forward(self, x_CBnd: Tensor, step: Step) -> Tensor:
        q_CBHnD, k_CBGnD, v_CBGnD = _heads(self, x_CBnd, step)
        both_ABGnD = GatherChunks.apply(torch.stack((k_CBGnD, v_CBGnD), 1), self._layout, self._wire)
        k_ABHnD, v_ABHnD = both_ABGnD.repeat_interleave(_groups(self), -3).unbind(1)
        out_CBHnD = CausalChunks.apply(q_CBHnD, k_ABHnD, v_ABHnD, self._layout.own_R[self._rank])
        return self.o_proj(out_CBHnD.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


class UlyssesAttention(Attention):
    """All tokens for a part of the heads: one all-to-all before the attention, and one after it."""

    def __init__(self, model: ModelConfig, wire: torch.dtype) -> None:
        super().__init__(model)
        self._wire = wire

    def forward(self, x_CBnd: Tensor, step: Step) -> Tensor:
        q_CBHnD, k_CBGnD, v_CBGnD = _heads(self, x_CBnd, step)
        if self._kv_heads % dist.get_world_size():  # too few heads to share out: repeat them before they travel
            k_CBGnD, v_CBGnD = (x.repeat_interleave(_groups(self), -3) for x in (k_CBGnD, v_CBGnD))
        q_BHTD = AllToAll.apply(q_CBHnD[0], 1, 2, self._wire)
        k_BHTD, v_BHTD = AllToAll.apply(torch.stack((k_CBGnD[0], v_CBGnD[0])), 2, 3, self._wire)
        groups = q_BHTD.shape[1] // k_BHTD.shape[1]
        k_BHTD, v_BHTD = (x.repeat_interleave(groups, 1) for x in (k_BHTD, v_BHTD))
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        out_BHnD = AllToAll.apply(out_BHTD, 2, 1, self._wire)
        return self.o_proj(out_BHnD.transpose(-3, -2).flatten(-2))[None]  # type: ignore[no-any-return]


class GatherChunks(Function):
    """The chunks of all ranks in their order, [A, …], from the own ones, [C, …]; gradients return to the owner."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, layout: Layout, wire: torch.dtype) -> Tensor:
        ctx.layout, ctx.wire = layout, wire
        sent = x_C.to(wire).contiguous()
        parts = [torch.empty_like(sent) for _ in layout.own_R]
        dist.all_gather(parts, sent)
        return torch.cat(parts)[_inverse(layout.order)].to(x_C.dtype)

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor) -> tuple[Tensor, None, None]:
        sent = grad_A[ctx.layout.order].to(ctx.wire)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.unflatten(0, (len(ctx.layout.own_R), -1)).to(grad_A.dtype).sum(0), None, None


class CausalChunks(Function):
    """Each own chunk of queries against itself and all chunks before it."""

    @staticmethod
    def forward(ctx: Any, q_CBHnD: Tensor, k_ABHnD: Tensor, v_ABHnD: Tensor, own: Sequence[int]) -> Tensor:
        k_BHTD, v_BHTD = _join(k_ABHnD), _join(v_ABHnD)
        outs, lses = [], []
        for q_BHnD, chunk in zip(q_CBHnD, own, strict=True):
            out, lse = block_forward(q_BHnD, *_own(k_BHTD, v_BHTD, chunk, q_BHnD), causal=True)
            if chunk:
                far, far_lse = block_forward(q_BHnD, *_earlier(k_BHTD, v_BHTD, chunk, q_BHnD), causal=False)
                total = torch.logaddexp(lse, far_lse)
                out = out * (lse - total).exp().unsqueeze(-1) + far * (far_lse - total).exp().unsqueeze(-1)
                lse = total
            outs.append(out)
            lses.append(lse)
        out_CBHnD = torch.stack(outs)
        ctx.own = own
        ctx.save_for_backward(q_CBHnD, k_BHTD, v_BHTD, out_CBHnD, torch.stack(lses))
        return out_CBHnD

    @staticmethod
    def backward(ctx: Any, dout_CBHnD: Tensor) -> tuple[Tensor | None, ...]:
        q_CBHnD, k_BHTD, v_BHTD, out_CBHnD, lse_CBHn = ctx.saved_tensors
        dq_CBHnD, dk_BHTD, dv_BHTD = (
            torch.zeros_like(q_CBHnD),
            torch.zeros_like(k_BHTD),
            torch.zeros_like(v_BHTD),
        )
        rows = zip(dout_CBHnD, q_CBHnD, out_CBHnD, lse_CBHn, dq_CBHnD, ctx.own, strict=True)
        for dout, q, out, lse, dq, chunk in rows:
            for part, causal in ((_own, True), (_earlier, False)):
                if not causal and not chunk:
                    continue
                k, v = part(k_BHTD, v_BHTD, chunk, q)
                grads = block_backward(dout, q, k, v, out, lse, causal=causal)
                dk, dv = part(dk_BHTD, dv_BHTD, chunk, q)
                for total, grad in zip((dq, dk, dv), grads, strict=True):
                    total += grad
        tokens = q_CBHnD.shape[-2]
        return dq_CBHnD, _part(dk_BHTD, tokens), _part(dv_BHTD, tokens), None


class AllToAll(Function):
    """Gives up a part of dimension `scatter` to each rank, and gets a part of dimension `gather` from each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, gather: int, wire: torch.dtype) -> Tensor:
        ctx.dims, ctx.wire = (gather, scatter), wire
        return _all_to_all(x, scatter, gather, wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scatter, gather = ctx.dims
        return _all_to_all(grad, scatter, gather, ctx.wire), None, None, None


def _all_to_all(x: Tensor, scatter: int, gather: int, wire: torch.dtype) -> Tensor:
    ranks = dist.get_world_size()
    sent = torch.stack(x.to(wire).chunk(ranks, scatter))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat(received.unbind(), gather).to(x.dtype)


def _heads(attention: Attention, x_CBnd: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both turned by RoPE) and values as [C, B, heads, n, D]."""
    q, k, v = (
        projection(x_CBnd).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = step.rope(q, step.positions), step.rope(k, step.positions)
    return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)


def _groups(attention: Attention) -> int:
    """Query heads for each key/value head."""
    return attention.q_proj.out_features // attention.k_proj.out_features


def _own(k_BHTD: Tensor, v_BHTD: Tensor, chunk: int, q_BHnD: Tensor) -> tuple[Tensor, Tensor]:
    tokens = q_BHnD.shape[-2]
    span = slice(chunk * tokens, (chunk + 1) * tokens)
    return k_BHTD[:, :, span], v_BHTD[:, :, span]


def _earlier(k_BHTD: Tensor, v_BHTD: Tensor, chunk: int, q_BHnD: Tensor) -> tuple[Tensor, Tensor]:
    span = slice(chunk * q_BHnD.shape[-2])
    return k_BHTD[:, :, span], v_BHTD[:, :, span]


def _join(x_ABHnD: Tensor) -> Tensor:
    return x_ABHnD.movedim(0, 2).flatten(2, 3)


def _part(x_BHTD: Tensor, tokens: int) -> Tensor:
    parts_BHAnD: Tensor = x_BHTD.unflatten(2, (-1, tokens))
    return parts_BHAnD.movedim(2, 0)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
