"""The passes of this node over a batch of contexts: its own chunks' tokens in, its part of the loss out.

The loss of a step is the mean over all target tokens of all nodes; a node computes the sum over its own, and the
sums of all nodes add up to it. Chunk owners see the next token of their last position from the corpus, so nothing
but the exchange's payloads travels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from node.data.batches import Contexts
from node.data.task import asked, begins, read
from node.exchange.chunks import ChunkExchange
from node.exchange.documents import Documents
from node.exchange.passes import PassSpec
from node.model.exchanged import ExchangedLlama
from node.model.key_value import Probe
from node.train.head import head_loss

T = TypeVar("T")


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

    The contexts are dealt to passes of `PayloadFormat.batch` contexts each, which are in flight together: one computes
    while the payloads of another travel, forward and, where gradients are enabled, backward. `draw` is as in
    `ChunkExchange.begin`; the passes of one call have streams of their own.
    """
    device = model.embed_tokens.weight.device
    parts = np.split(contexts, len(contexts) // exchange.payload.batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        begun = [
            _pass(model, exchange, part, spec, probe, (*draw, index) if index else draw)
            for index, part in enumerate(parts)
        ]
        losses = in_turns(begun)
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _pass(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    contexts: Contexts,
    spec: PassSpec,
    probe: Probe | None,
    draw: tuple[int, ...],
) -> Generator[None, None, Tensor]:
    """One pass, in steps as `ExchangedLlama.overlapped`; its loss."""
    trains = torch.is_grad_enabled()
    documents = Documents(begins(contexts[:, :-1]), spec.tokens) if exchange.payload.documents else None
    handle = exchange.begin(spec, trains=trains, draw=draw, documents=documents)
    inputs_CBn, targets_CBn = own_tokens(contexts, exchange.own, spec, model.embed_tokens.weight.device)
    hidden_CBnd = yield from model.overlapped(inputs_CBn, handle, probe)
    if not trains:
        handle.finish_forward()
    return head_loss(hidden_CBnd.flatten(0, 2), model.lm_head.weight, targets_CBn.flatten())


def in_turns(works: Sequence[Generator[None, None, T]]) -> list[T]:
    """Run generators to their ends, a step of each in turn; their results in order."""
    results: dict[int, T] = {}
    while len(results) < len(works):
        for index, work in enumerate(works):
            if index not in results:
                try:
                    next(work)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(works))]
