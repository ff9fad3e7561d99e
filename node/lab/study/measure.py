"""Measures of a study: held-out loss by position in the context, stable ranks of projections, payload bytes.

Positions are counted over the whole context, whatever the chunks are, so that arms can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from node.config import Config
from node.data.batches import Contexts
from node.data.task import NOT_ASKED, Task, asked, read
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.model.exchanged import ExchangedLlama
from node.train.passes import own_tokens
from node.train.schedule import StepSchedule


def position_losses(
    model: ExchangedLlama, exchange: ChunkExchange, task: Task, spec: PassSpec, batch: int, batches: int
) -> tuple[Tensor, Tensor]:
    """(sum of losses in nats, targets asked for) at every position, [T] each, over the first held-out batches.

    The exchange must own all chunks. Raises `ConfigError` where the held-out part is shorter than a context.
    """
    losses_DT, asked_DT = heldout_losses(model, exchange, task, spec, batch, batches)
    return (losses_DT * asked_DT).sum(0), asked_DT.sum(0)


def heldout_losses(
    model: ExchangedLlama, exchange: ChunkExchange, task: Task, spec: PassSpec, batch: int, batches: int
) -> tuple[Tensor, Tensor]:
    """(losses in nats in float64, whether asked for) of every target of the first held-out contexts, [contexts, T]
    each. Targets that are not asked for have their losses too."""
    context = len(exchange.own) * spec.tokens
    available = max(1, task.heldout_count(context) // batch)
    parts = []
    model.eval()
    with torch.no_grad():
        for index in range(min(batches, available)):
            parts.append(_losses(model, exchange, task.heldout_contexts(context, index * batch, batch), spec))
    model.train()
    losses, asked = zip(*parts, strict=True)
    return torch.cat(losses).double(), torch.cat(asked)


def _losses(
    model: ExchangedLlama, exchange: ChunkExchange, contexts: Contexts, spec: PassSpec
) -> tuple[Tensor, Tensor]:
    inputs_CBn, targets_CBn = own_tokens(read(contexts), exchange.own, spec, torch.device("cpu"))
    handle = exchange.begin(spec, trains=False)
    hidden_CBnd = model.hidden(inputs_CBn, handle)
    handle.finish_forward()
    # One chunk at a time: the logits of a context over 49,152 tokens are 400 MB.
    losses_CBn = torch.stack([_chunk_losses(model, *pair) for pair in zip(hidden_CBnd, targets_CBn, strict=True)])
    return losses_CBn.transpose(0, 1).flatten(1), torch.from_numpy(asked(contexts)[:, 1:] != NOT_ASKED)


def _chunk_losses(model: ExchangedLlama, hidden_Bnd: Tensor, targets_Bn: Tensor) -> Tensor:
    logits = model.lm_head(hidden_Bnd).flatten(0, 1)
    return F.cross_entropy(logits, targets_Bn.flatten(), reduction="none").view_as(targets_Bn)


def payload_bytes(config: Config, payload: PayloadFormat) -> dict[str, float]:
    """Bytes per token, one way to one reader, by the formula that the wire is tested against.

    `compressed` is of the mean compressed layer (0 where none is), `layer` of the mean layer while compression is on,
    layers that send nothing included, `returned` the same of the gradients that a reader sends back, `trained` of the
    mean layer over all tokens of the training, uncompressed steps included, and `plain` of a layer with K and V as they
    are. `payload` knows the ranks of a budget once they have been chosen.
    """
    schedule = StepSchedule(config.model, config.compress, config.train)
    full = schedule.pass_spec(config.compress.warm_start_steps + 1)
    layers = _layer_bytes(config, payload, full)
    narrow = [layers[layer] for layer in config.compressed]
    steps = Counter(schedule.pass_spec(step) for step in range(1, config.train.steps + 1))
    tokens = sum(count * spec.tokens for spec, count in steps.items())
    sent = sum(count * spec.tokens * fmean(_layer_bytes(config, payload, spec)) for spec, count in steps.items())
    return {
        "compressed": fmean(narrow) if narrow else 0.0,
        "layer": fmean(layers),
        "returned": fmean(_layer_bytes(config, payload, full, "grad")),
        "trained": sent / tokens,
        "plain": payload.uncompressed_bytes(full) / (config.train.batch * full.tokens),
    }


def _layer_bytes(config: Config, payload: PayloadFormat, spec: PassSpec, kind: str = "kv") -> list[float]:
    layers = range(payload.layers)
    sizes = [payload.chunk_bytes(layer, spec, kind) + payload.theta_bytes(layer, spec) for layer in layers]
    return [size / (config.train.batch * spec.tokens) for size in sizes]


def stable_rank(weight: Tensor) -> float:
    """‖W‖²_F / ‖W‖²₂ over the greatest rank that W could have: between 0 and 1."""
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values.square().sum() / values[0].square() / len(values))


def stable_ranks(model: nn.Module, layers: int) -> list[Mapping[str, float]]:
    """Stable rank of W_Q, W_K and W_V, by layer."""
    found: list[Mapping[str, float]] = []
    for layer in range(layers):
        weights = {kind: model.get_parameter(f"layers.{layer}.self_attn.{kind}_proj.weight") for kind in "qkv"}
        found.append({kind: stable_rank(weight) for kind, weight in weights.items()})
    return found
