"""One block of attention: queries against one run of keys, with the log-sum-exp that merging needs.

Fused kernels where torch has one that returns the log-sum-exp, plain matrix products elsewhere.
The backward takes the *merged* output and log-sum-exp, so that one block's gradient is right although the
softmax runs over all blocks (as in FlashAttention-2, section 3, and Ring Attention).
Blocks are put together in `node.model.attention`.

Shapes: B batch, H heads, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_LEAST_KEYS = 16
"""With fewer keys, torch's CPU kernel gives out = 0 and lse = 0 for a row whose scores are all NaN, and hides them."""
_HALF = (torch.float16, torch.bfloat16)


def block_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of one block: (out_BHTD, lse_BHT). `causal` masks S > T and wants T = S."""
    if q_BHTD.device.type == "cpu":
        if k_BHSD.shape[-2] < _LEAST_KEYS and not (q_BHTD.isfinite().all() and k_BHSD.isfinite().all()):
            return plain_forward(q_BHTD, k_BHSD, v_BHSD, causal)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHSD, v_BHSD, 0.0, causal)
        return out, lse
    if q_BHTD.dtype in _HALF:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q_BHTD, k_BHSD, v_BHSD, 0.0, causal, False)
        return out, lse
    return plain_forward(q_BHTD, k_BHSD, v_BHSD, causal)


def block_backward(
    dout_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of one block, given the merged `out` and `lse` of all blocks."""
    if q_BHTD.device.type == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, 0.0, causal
        )
        return dq, dk, dv
    if q_BHTD.dtype in _HALF:
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q_BHTD.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *(dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT),
            *(None, None, q_BHTD.shape[2], k_BHSD.shape[2], 0.0, causal, no_dropout, no_dropout),
        )
        return dq, dk, dv
    return plain_backward(dout_BHTD, q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, causal)


def plain_forward(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`block_forward` in matrix products: any device and dtype, memory O(T·S)."""
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
    """`block_backward` in matrix products."""
    p_BHTS = torch.exp(_scores(q_BHTD, k_BHSD, causal) - lse_BHT.unsqueeze(-1)).to(v_BHSD.dtype)
    delta_BHT1 = (dout_BHTD * out_BHTD).sum(-1, keepdim=True)
    ds_BHTS = p_BHTS * (dout_BHTD @ v_BHSD.mT - delta_BHT1) * q_BHTD.shape[-1] ** -0.5
    return ds_BHTS @ k_BHSD, ds_BHTS.mT @ q_BHTD, p_BHTS.mT @ dout_BHTD


def _scores(q_BHTD: Tensor, k_BHSD: Tensor, causal: bool) -> Tensor:
    scores_BHTS = (q_BHTD @ k_BHSD.mT).float() if q_BHTD.dtype in _HALF else q_BHTD @ k_BHSD.mT
    scores_BHTS = scores_BHTS * float(q_BHTD.shape[-1] ** -0.5)
    if causal:
        later = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTD.device).triu(1)
        scores_BHTS = scores_BHTS.masked_fill(later, float("-inf"))
    return scores_BHTS
