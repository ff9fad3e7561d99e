"""torch's own ring attention (torch.distributed.tensor.experimental), with a shim that gives it the CPU's kernel.

torch calls its ring for CUDA kernels only. The templates below it, which pass keys and values round and merge, take any
kernel; the shim hands them the one for CPUs. They are private parts of torch and may change: where they are missing or
fail, the bench leaves this arm out and says why. Chunks are contiguous, without torch's load balancing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from node.model.llama import Attention, Step

_aten = torch.ops.aten
_torch_ring: Any = import_module("torch.distributed.tensor.experimental._context_parallel._attention")
_TOKENS = 2
"""The dimension of tokens in [B, H, n, D]."""


class RingAttention(Attention):
    """The attention of one own chunk by torch's ring."""

    def forward(self, x_CBnd: Tensor, step: Step) -> Tensor:
        x_Bnd, positions = x_CBnd[0], step.positions[0]
        q_BHnD = step.rope(self.q_proj(x_Bnd).unflatten(-1, (-1, self.head_dim)), positions).transpose(-3, -2)
        k_BGnD, v_BGnD = self.heads(self.k_proj(x_Bnd), self.v_proj(x_Bnd), positions, step.rope)
        groups = q_BHnD.shape[-3] // k_BGnD.shape[-3]
        out_BHnD = _Ring.apply(q_BHnD, *(x.repeat_interleave(groups, -3) for x in (k_BGnD, v_BGnD)))
        return self.o_proj(out_BHnD.transpose(-3, -2).flatten(-2))[None]  # type: ignore[no-any-return]


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _torch_ring._cp_options.enable_load_balance = False
        _torch_ring._cp_options.rotate_method = _torch_ring._RotateMethod.ALL_TO_ALL
        out, lse = _torch_ring._templated_ring_attention(dist.group.WORLD, _TOKENS, _kernel, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return _torch_ring._templated_ring_attention_backward(  # type: ignore[no-any-return]
            dist.group.WORLD, _TOKENS, _kernel_backward, dout.contiguous(), "grad_out", *ctx.saved_tensors, True
        )


def _kernel(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    return out, lse


def _kernel_backward(
    *, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool, grad_out: Tensor
) -> tuple[Tensor, ...]:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )
