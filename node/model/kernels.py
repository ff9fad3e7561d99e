"""One block of attention: queries against one run of keys, with the log-sum-exp that merging needs.

Fused kernels where torch has one that returns the log-sum-exp, plain matrix products elsewhere.
The backward takes the *merged* output and log-sum-exp, so that one block's gradient is right although the
softmax runs over all blocks (as in FlashAttention-2, section 3, and Ring Attention).
Blocks are put together in `node.model.attention`.

Keys and values have G heads, each of which H/G consecutive query heads read. They are never repeated on the CPU: its
kernel wants as many heads of keys as of queries, so each head of keys becomes an entry of the batch, and the query
heads that read it see it through a stride of zero. (On a GPU they are repeated for the time of the call.)

Shapes: B batch, H query heads, G key/value heads, g = H/G, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_LEAST_KEYS = 16
"""With fewer keys, torch's CPU kernel gives out = 0 and lse = 0 for a row whose scores are all NaN, and hides them."""
HALF = (torch.float16, torch.bfloat16)


def block_forward(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of one block: (out_BHTD, lse_BHT). `causal` masks S > T and wants T = S."""
    groups = q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BGSD, v_BGSD = _in_rows(k_BGSD), _in_rows(v_BGSD)
    if groups == 1:
        return _forward(q_BHTD, k_BGSD, v_BGSD, causal)
    q, k, v = _queries_by_group(q_BHTD, groups), _shared(k_BGSD, groups), _shared(v_BGSD, groups)
    out, lse = _forward(q, k, v, causal)
    return _heads(out, len(q_BHTD)), _heads(lse, len(q_BHTD))


def block_backward(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq_BHTD, dk_BGSD, dv_BGSD) of one block, given the merged `out` and `lse` of all blocks."""
    dq, dk_BHSD, dv_BHSD = gradients_by_head(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, causal)
    return dq, sum_of_heads(dk_BHSD, k_BGSD.shape[1]), sum_of_heads(dv_BHSD, k_BGSD.shape[1])


def gradients_by_head(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_backward` with the part of each query head in the gradients of keys and values: dq, dk, dv [B, H, …]."""
    batch, groups = len(q_BHTD), q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BGSD, v_BGSD = _in_rows(k_BGSD), _in_rows(v_BGSD)
    if groups == 1:
        return _backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, causal)
    dout, q, out, lse = (_queries_by_group(x, groups) for x in (dout_BHTD, q_BHTD, out_BHTD, lse_BHT))
    dq, dk, dv = _backward(dout, q, _shared(k_BGSD, groups), _shared(v_BGSD, groups), out, lse, causal)
    return _heads(dq, batch), _heads(dk, batch), _heads(dv, batch)


def sum_of_heads(x_BHSD: Tensor, kv_heads: int) -> Tensor:
    """[B, G, S, D] from the parts [B, H, S, D] of all query heads."""
    if x_BHSD.shape[1] == kv_heads:
        return x_BHSD
    parts_BGgSD: Tensor = x_BHSD.unflatten(1, (kv_heads, -1))
    return parts_BGgSD.sum(2)


def _in_rows(x_BGSD: Tensor) -> Tensor:
    """Keys or values whose numbers lie side by side for each token and head, as torch's kernels take for granted. A
    codec's product may lie otherwise."""
    return x_BGSD if x_BGSD.stride(-1) == 1 else x_BGSD.contiguous()


def _queries_by_group(x_BHT: Tensor, groups: int) -> Tensor:
    """[B, H, T, …] to [B·G, g, T, …]: the query heads that share a head of keys are the heads of one entry."""
    parts_BGgT: Tensor = x_BHT.unflatten(1, (-1, groups))
    return parts_BGgT.flatten(0, 1)


def _heads(x_BgT: Tensor, batch: int) -> Tensor:
    """Back from `_queries_by_group`, in the kernel's layout: the heads of a token lie side by side."""
    parts_BTGg = x_BgT.unflatten(0, (batch, -1)).movedim(3, 1)
    heads_BTH: Tensor = parts_BTGg.flatten(2, 3).contiguous()  # so that the product that follows need not copy it
    return heads_BTH.transpose(1, 2)


def _shared(x_BGSD: Tensor, groups: int) -> Tensor:
    """[B, G, S, D] to [B·G, g, S, D]: a head of keys or values as each of its query heads sees it, without a copy."""
    return x_BGSD.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)


def _forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q_BHTD.device.type == "cpu":
        if k_BHSD.shape[-2] < _LEAST_KEYS and not (q_BHTD.isfinite().all() and k_BHSD.isfinite().all()):
            return plain_forward(q_BHTD, k_BHSD, v_BHSD, causal)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHSD, v_BHSD, 0.0, causal)
        return out, lse
    if q_BHTD.dtype in HALF:
        k_BHSD, v_BHSD = k_BHSD.contiguous(), v_BHSD.contiguous()
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q_BHTD, k_BHSD, v_BHSD, 0.0, causal, False)
        return out, lse
    return plain_forward(q_BHTD, k_BHSD, v_BHSD, causal)


def _backward(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q_BHTD.device.type == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, 0.0, causal
        )
        return dq, dk, dv
    if q_BHTD.dtype in HALF:
        k_BHSD, v_BHSD = k_BHSD.contiguous(), v_BHSD.contiguous()
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q_BHTD.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *(dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT),
            *(None, None, q_BHTD.shape[2], k_BHSD.shape[2], 0.0, causal, no_dropout, no_dropout),
        )
        return dq, dk, dv
    return plain_backward(dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, causal)


def plain_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One block with as many heads of keys as of queries, in matrix products: any device and dtype, memory O(T·S)."""
    scores_BHTS = _scores(q_BHTD, k_BHSD, causal)
    lse_BHT = scores_BHTS.logsumexp(-1)
    return torch.exp(scores_BHTS - lse_BHT.unsqueeze(-1)).to(v_BHSD.dtype) @ v_BHSD, lse_BHT


def plain_backward(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `plain_forward`, in matrix products."""
    p_BHTS = torch.exp(_scores(q_BHTD, k_BHSD, causal) - lse_BHT.unsqueeze(-1)).to(v_BHSD.dtype)
    delta_BHT1 = (dout_BHTD * out_BHTD).sum(-1, keepdim=True)
    ds_BHTS = p_BHTS * (dout_BHTD @ v_BHSD.mT - delta_BHT1) * q_BHTD.shape[-1] ** -0.5
    return ds_BHTS @ k_BHSD, ds_BHTS.mT @ q_BHTD, p_BHTS.mT @ dout_BHTD


def _scores(q_BHTD: Tensor, k_BHSD: Tensor, causal: bool) -> Tensor:
    scores_BHTS = (q_BHTD @ k_BHSD.mT).float() if q_BHTD.dtype in HALF else q_BHTD @ k_BHSD.mT
    scores_BHTS = scores_BHTS * float(q_BHTD.shape[-1] ** -0.5)
    if causal:
        later = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTD.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(later, float("-inf"))
    return scores_BHTS
