"""Passes that go through each layer together, as they do where weights are sharded, are those that take turns."""

from __future__ import annotations

import msgspec
import pytest
import torch
from helpers.small import contexts, largest_difference, small_config, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, exchange_of, full_spec

from node.train.passes import loss_sum

Found = tuple[float, float, dict[str, torch.Tensor]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_the_same_function(micro_batches: int, recompute: bool) -> None:
    config = small_config(batch=4)
    train = msgspec.structs.replace(config.train, micro_batches=micro_batches)
    config = msgspec.structs.replace(config, train=train, run=msgspec.structs.replace(config.run, recompute=recompute))

    def found(sharded: bool) -> list[Found]:
        def work(rank: int, wire: ThreadWire) -> Found:
            model = small_model(config)
            model.sharded = sharded
            exchange = exchange_of(config, WORLDS["zigzag"], rank, wire)
            loss = loss_sum(model, exchange, contexts(config), full_spec(config))
            loss.backward()
            with torch.no_grad():
                again = loss_sum(model, exchange, contexts(config, 1), full_spec(config))
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return loss.item(), again.item(), gradients

        return run_ranks(2, work)

    for (loss, held, gradients), (other, other_held, others) in zip(found(True), found(False), strict=True):
        assert loss == other
        assert held == other_held
        assert largest_difference(gradients, others) < 1e-6
