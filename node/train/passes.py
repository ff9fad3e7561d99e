"""The passes of this node over a batch of contexts: its own chunks' tokens in, its part of the loss out.

The loss of a step is the mean over all target tokens of all nodes; a node computes the sum over its own, and the
sums of all nodes add up to it. Chunk owners see the next token of their last position from the corpus, so nothing
but the exchange's payloads travels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from node.data.batches import Contexts
from node.data.task import asked, begins, read
from node.exchange.chunks import ChunkExchange, Pass
from node.exchange.documents import Documents
from node.exchange.passes import PassSpec
from node.model.exchanged import ExchangedLlama
from node.model.key_value import Probe
from node.model.turns import in_turns
from node.site.sharding import forget_pass
from node.train.head import head_loss


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
    `ChunkExchange.begin`; the passes of one call have streams of their own. Where the model is sharded over a site, all
    processes of the site must call this together.
    """
    device = model.embed_tokens.weight.device
    parts = np.split(contexts, len(contexts) // exchange.payload.batch)
    draws = [(*draw, index) if index else draw for index in range(len(parts))]
    # Where weights come and go, autocast must not keep copies of them.
    caches = not model.sharded
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=caches):
        if model.sharded:
            losses = model.whole(lambda: _layer_by_layer(model, exchange, parts, spec, probe, draws))
            if not torch.is_grad_enabled():
                forget_pass(model)
        else:
            passes = zip(parts, draws, strict=True)
            losses = in_turns([_pass(model, exchange, part, spec, probe, name) for part, name in passes])
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


class _Begun(NamedTuple):
    """A pass under way, with what goes in and what is asked for, [C, B, n]."""

    handle: Pass
    inputs_CBn: Tensor
    targets_CBn: Tensor


def _begin(
    model: ExchangedLlama, exchange: ChunkExchange, contexts: Contexts, spec: PassSpec, draw: tuple[int, ...]
) -> _Begun:
    documents = Documents(begins(contexts[:, :-1]), spec.tokens) if exchange.payload.documents else None
    handle = exchange.begin(spec, trains=torch.is_grad_enabled(), draw=draw, documents=documents)
    return _Begun(handle, *own_tokens(contexts, exchange.own, spec, model.embed_tokens.weight.device))


def _end(model: ExchangedLlama, begun: _Begun, hidden_CBnd: Tensor) -> Tensor:
    """The loss of a pass."""
    if not begun.handle.key.trains:
        begun.handle.finish_forward()
    return head_loss(hidden_CBnd.flatten(0, 2), model.lm_head.weight, begun.targets_CBn.flatten())


def _pass(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    contexts: Contexts,
    spec: PassSpec,
    probe: Probe | None,
    draw: tuple[int, ...],
) -> Generator[None, None, Tensor]:
    """One pass, in steps as `ExchangedLlama.overlapped`; its loss."""
    begun = _begin(model, exchange, contexts, spec, draw)
    hidden_CBnd = yield from model.overlapped(begun.inputs_CBn, begun.handle, probe)
    return _end(model, begun, hidden_CBnd)


def _layer_by_layer(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    parts: Sequence[Contexts],
    spec: PassSpec,
    probe: Probe | None,
    draws: Sequence[tuple[int, ...]],
) -> list[Tensor]:
    """The losses of all passes, which go through each layer together: a layer's weights are gathered once for all."""
    begun = [_begin(model, exchange, part, spec, draw) for part, draw in zip(parts, draws, strict=True)]
    hidden = model.hidden_together([(one.inputs_CBn, one.handle) for one in begun], probe)
    return [_end(model, one, hidden_CBnd) for one, hidden_CBnd in zip(begun, hidden, strict=True)]
