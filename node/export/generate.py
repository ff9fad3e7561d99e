"""Text that a model goes on with, one token after another.

Each token takes a forward pass of this node alone, which owns all chunks. Where the model compresses, a pass is a whole
context, padded behind the last token, because what a chunk's subspace keeps depends on where the chunk begins; no logit
sees a later token. A model that does not compress is one function of the tokens however they are cut, but for the
rounding of what crosses from chunk to chunk, so its passes are only as long as the text. Nothing is kept from one pass
to the next: this shows what a model has learned, and is no server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.model.exchanged import ExchangedLlama


class Sampling(NamedTuple):
    """How tokens are drawn: at this temperature (0: always the likeliest), from a stream of this seed."""

    temperature: float
    seed: int


def continuation(
    model: ExchangedLlama, exchange: ChunkExchange, spec: PassSpec, prompt: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """The ids that follow the prompt, without end. What lies further back than a context is not seen.

    `exchange` owns all chunks; `spec` is that of the model's passes. The prompt has at least one id.
    """
    ids = list(prompt)
    draw = torch.Generator().manual_seed(sampling.seed)
    while True:
        logits = next_logits(model, exchange, spec, ids)
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            shares = torch.softmax(logits / sampling.temperature, dim=-1)
            token = int(torch.multinomial(shares, 1, generator=draw))
        ids.append(token)
        yield token


@torch.no_grad()
def next_logits(model: ExchangedLlama, exchange: ChunkExchange, spec: PassSpec, ids: Sequence[int]) -> Tensor:
    """Logits [vocab] of the token after `ids`, in float32 on the CPU."""
    chunks = exchange.payload.chunks
    window = list(ids[-chunks * spec.tokens :])
    if not spec.compressed:
        spec = spec._replace(tokens=-(-len(window) // chunks))
    padded = torch.zeros(chunks * spec.tokens, dtype=torch.long)
    padded[: len(window)] = torch.tensor(window)
    device = model.embed_tokens.weight.device
    handle = exchange.begin(spec, trains=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden_C1nd = model.hidden(padded.view(chunks, 1, spec.tokens).to(device), handle)
        handle.finish_forward()
        last_d = hidden_C1nd.flatten(0, 2)[len(window) - 1]
        return model.lm_head(last_d).float().cpu()  # type: ignore[no-any-return]
