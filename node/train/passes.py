"""One pass of this node over a batch of contexts: its own chunks' tokens in, its part of the loss out.

The loss of a step is the mean over all target tokens of all nodes; a node computes the sum over its own, and the
sums of all nodes add up to it. Chunk owners see the next token of their last position from the corpus, so nothing
but the exchange's payloads travels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from node.data.batches import Contexts
from node.data.task import NOT_ASKED, asked, read
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.model.exchanged import ExchangedLlama
from node.model.key_value import Probe


def own_tokens(contexts: Contexts, own: tuple[int, ...], spec: PassSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [C, B, n] of the own chunks, out of contexts [B, T + 1] (`node.data.task` has their form)."""
    starts = [chunk * spec.tokens for chunk in own]
    inputs = read(np.stack([contexts[:, start : start + spec.tokens] for start in starts]))
    targets = asked(np.stack([contexts[:, start + 1 : start + spec.tokens + 1] for start in starts]))
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


def loss_sum(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    contexts: Contexts,
    spec: PassSpec,
    probe: Probe | None = None,
    draw: tuple[int, ...] = (0,),
) -> Tensor:
    """Sum of the losses (nats) of the own chunks' targets that are asked for. On a GPU the compute runs in bf16.

    It is one pass of the exchange, with a backward where gradients are enabled; `draw` as in `ChunkExchange.begin`.
    """
    trains = torch.is_grad_enabled()
    handle = exchange.begin(spec, trains=trains, draw=draw)
    device = model.embed_tokens.weight.device
    inputs_CBn, targets_CBn = own_tokens(contexts, exchange.own, spec, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits_CBnV = model.logits(inputs_CBn, handle, probe)
    if not trains:
        handle.finish_forward()
    logits_tV = logits_CBnV.flatten(0, 2).float()
    return F.cross_entropy(logits_tV, targets_CBn.flatten(), reduction="sum", ignore_index=NOT_ASKED)
