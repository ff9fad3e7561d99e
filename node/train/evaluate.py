"""The held-out loss: a walk over tokens that training never sees, forward only, each node on its own chunks."""

from __future__ import annotations

import torch

from node.data.task import Task, count_asked, heldout_batches
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.model.exchanged import ExchangedLlama
from node.site.site import ALONE, Site
from node.subspace.energy import EnergyReport
from node.train.passes import loss_sum


def heldout_loss(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    task: Task,
    spec: PassSpec,
    batch: int,
    batches: int,
    report: EnergyReport | None = None,
    site: Site = ALONE,
) -> tuple[float, int]:
    """(sum of losses in nats, number of target tokens) of the own chunks over the walk's first `batches` batches, and
    of a site's contexts those of this process.

    `report`, if given, sees what the subspaces keep. The walk may be shorter; a last batch that is not full is left
    out, so that payloads keep their shape. Raises `ConfigError` where no batch is full.
    """
    chunks = exchange.payload.chunks
    context = chunks * spec.tokens
    available = heldout_batches(task, context, batch)
    total, count = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for index in range(min(batches, available)):
                contexts = site.part(task.heldout_contexts(context, index * batch, batch))
                total += float(loss_sum(model, exchange, contexts, spec, report))
                starts = [chunk * spec.tokens for chunk in exchange.own]
                count += sum(count_asked(contexts[:, start : start + spec.tokens + 1]) for start in starts)
    finally:
        model.train()  # also where the membership changes in the middle: training goes on then
    return total, count
