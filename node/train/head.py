"""The output head and its loss, a run of tokens at a time, so that no [tokens, vocabulary] tensor is kept.

With 50,257 tokens in the vocabulary, the logits of 16K tokens are 3.3 GB in float32, and their gradient as much again:
far more than all that the layers keep. The loss of each run is computed together with its gradients, which are small,
and the logits are dropped before the next run. No product is computed twice.

Shapes: t tokens, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from node.data.task import NOT_ASKED

RUN_TOKENS = 1024
"""Tokens of one run."""


def head_loss(hidden_td: Tensor, weight_Vd: Tensor, targets_t: Tensor) -> Tensor:
    """Sum of the cross-entropies (nats) of the targets that are asked for, in float32."""
    if len(hidden_td) <= RUN_TOKENS:
        return _loss(F.linear(hidden_td, weight_Vd), targets_t)
    if not torch.is_grad_enabled():
        runs = zip(hidden_td.split(RUN_TOKENS), targets_t.split(RUN_TOKENS), strict=True)
        return torch.stack([_loss(F.linear(hidden, weight_Vd), targets) for hidden, targets in runs]).sum()
    loss: Tensor = _HeadLoss.apply(hidden_td, weight_Vd, targets_t)
    return loss


def _loss(logits_tV: Tensor, targets_t: Tensor) -> Tensor:
    return F.cross_entropy(logits_tV.float(), targets_t, reduction="sum", ignore_index=NOT_ASKED)


class _HeadLoss(Function):
    """`head_loss` with its gradients, run by run. The backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_td: Tensor, weight_Vd: Tensor, targets_t: Tensor) -> Tensor:
        weight = weight_Vd.to(torch.get_autocast_dtype(hidden_td.device.type)) if _autocasts(hidden_td) else weight_Vd
        loss = torch.zeros((), device=hidden_td.device)
        d_hidden, d_weight = torch.empty_like(hidden_td), torch.zeros_like(weight_Vd)
        for start in range(0, len(hidden_td), RUN_TOKENS):
            run = slice(start, start + RUN_TOKENS)
            hidden, targets = hidden_td[run].to(weight.dtype), targets_t[run]
            logits = (hidden @ weight.mT).float()
            loss += F.cross_entropy(logits, targets, reduction="sum", ignore_index=NOT_ASKED)
            d_logits = torch.softmax(logits, dim=-1)
            d_logits[torch.arange(len(targets)), targets.clamp_min(0)] -= 1.0
            d_logits[targets == NOT_ASKED] = 0.0
            d_logits = d_logits.to(weight.dtype)
            d_hidden[run] = d_logits @ weight
            d_weight += d_logits.mT @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * upstream.to(d_hidden.dtype), d_weight * upstream, None


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
