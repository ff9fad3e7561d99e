"""The held-out loss: a walk over tokens that training never sees, forward only, each node on its own chunks."""

from __future__ import annotations

import torch

from netem.errors import ConfigError
from node.data.batches import heldout_contexts, heldout_count
from node.data.tokenizers import TokenArray
from node.exchange.chunks import ChunkExchange
from node.model.llama import Llama
from node.schedule import PassSpec
from node.train.passes import loss_sum


def heldout_loss(
    model: Llama, exchange: ChunkExchange, tokens: TokenArray, spec: PassSpec, batch: int, batches: int
) -> tuple[float, int]:
    """(sum of losses in nats, number of target tokens) of the own chunks over the walk's first `batches` batches.

    The walk may be shorter; a last batch that is not full is left out, so that payloads keep their shape. Raises
    `ConfigError` where no batch is full.
    """
    chunks = exchange.payload.chunks
    context = chunks * spec.tokens
    available = heldout_count(tokens, context) // batch
    if not available:
        raise ConfigError(
            f"train.batch = {batch}: the held-out part of the corpus holds {heldout_count(tokens, context)} contexts "
            f"of {context} tokens, fewer than a batch; set a smaller batch or name a larger corpus"
        )
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for index in range(min(batches, available)):
            contexts = heldout_contexts(tokens, context, index * batch, batch)
            total += float(loss_sum(model, exchange, contexts, spec))
            count += len(contexts) * len(exchange.own) * spec.tokens
    model.train()
    return total, count
