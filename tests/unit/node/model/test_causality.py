"""Position t's logits depend on no token after t, to the bit, in every mode, on one rank and on four."""

from __future__ import annotations

import pytest
import torch
from helpers.small import VOCAB, contexts, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, exchange_of, full_spec, logits_of, tiny_config
from torch import Tensor

CHUNK = 8
CHANGED = (0, 3, 7, 8, 15, 16, 20, 31)
"""First, middle and last tokens of chunks, both sides of a border, the first and the last of the context."""


def all_logits(mode: str, world: str, last_attends: bool = True) -> list[Tensor]:
    """Logits [B, T, vocab] of the contexts as they are, then with each of `CHANGED` changed."""
    config = tiny_config(compress=MODES[mode])
    assert config.model.chunk_tokens == CHUNK
    tokens = torch.from_numpy(contexts(config)[:, :-1])
    variants = [tokens]
    for place in CHANGED:
        variant = tokens.clone()
        variant[:, place] = (variant[:, place] + 1) % VOCAB
        variants.append(variant)

    def work(rank: int, wire: ThreadWire) -> list[Tensor]:
        model = small_model(config)
        if not last_attends:
            torch.nn.init.zeros_(model.get_parameter("layers.2.self_attn.o_proj.weight"))
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        own = [torch.stack([v[:, c * CHUNK : (c + 1) * CHUNK] for c in exchange.own]) for v in variants]
        with torch.no_grad():
            return [logits_of(model, inputs, exchange, full_spec(config)) for inputs in own]

    parts = run_ranks(len(WORLDS[world]), work)
    order = [chunk for own in WORLDS[world] for chunk in own]
    joined = [torch.cat([part[number] for part in parts]) for number in range(len(variants))]
    return [logits[torch.tensor(order).argsort()].movedim(0, 1).flatten(1, 2) for logits in joined]


@pytest.mark.parametrize("world", ["1", "4", "zigzag"])
@pytest.mark.parametrize("mode", MODES)
def test_a_token_changes_nothing_before_it(mode: str, world: str) -> None:
    base, *changed = all_logits(mode, world)
    for place, logits in zip(CHANGED, changed, strict=True):
        assert torch.equal(logits[:, :place], base[:, :place]), f"token {place} is seen before it"
        differs = (logits != base).any(-1).all(0)  # by position, in every context of the batch
        end = (place // CHUNK + 1) * CHUNK
        assert differs[place:end].all(), f"token {place} is not seen by its own chunk"
        if mode == "local":
            assert not differs[end:].any(), "a chunk is seen from another although nothing may travel"
        else:
            assert differs[end:].all(), f"token {place} is not seen by later chunks"


@pytest.mark.parametrize("world", ["1", "4", "zigzag"])
@pytest.mark.parametrize("mode", ["only the last layer sees far, whole", "only the last layer sees far, compressed"])
def test_where_only_the_last_layer_sees_far_the_others_see_their_own_chunk(mode: str, world: str) -> None:
    """Once nothing comes of the last layer's attention, no chunk is seen from another."""
    base, *changed = all_logits(mode, world, last_attends=False)
    for place, logits in zip(CHANGED, changed, strict=True):
        differs = (logits != base).any(-1).all(0)
        assert {token // CHUNK for token in differs.nonzero().flatten().tolist()} == {place // CHUNK}
