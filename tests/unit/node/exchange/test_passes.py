"""Several passes in flight: their forwards and backwards in any order are what they are one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from helpers.small import contexts, largest_difference, relative_difference, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, Loop, exchange_of, full_spec, loss_and_gradients, tiny_config
from torch import Tensor

from coordinator.assignment import Assignment
from node.config import Config
from node.config.compress import ScaledName
from node.exchange.passes import PassKey
from node.exchange.payload import step_bytes
from node.exchange.wire import Wire
from node.train.from_config import payload_format
from node.train.passes import loss_sum

SCALED = get_args(ScaledName)

TOLERANCE = 2e-6
GRADIENTS_WITHIN = {
    "float32": 1e-6,
    "bfloat16": 3e-3,
    "int8": 0.01,
    "fp8": 0.05,
    "int4": 0.15,
    "int2": 0.8,
    "topk10": 0.5,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"mode {name}": settings for name, settings in MODES.items()},
    **{f"dense in {name}": {"mode": "dense", "dense_format": name} for name in SCALED},
    **{f"compressed in {name}": {"format": name, "dense_format": "float32"} for name in SCALED},
}
ORDERS = {"one after the other": "F0 B0 F1 B1", "first in, first out": "F0 F1 B0 B1", "mirrored": "F0 F1 B1 B0"}


def gradients(config: Config, world: Sequence[Sequence[int]], order: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Losses of two passes over different contexts and the sum of their gradients, by rank."""

    def work(rank: int, wire: ThreadWire) -> tuple[float, dict[str, Tensor]]:
        model, exchange = small_model(config), exchange_of(config, world, rank, wire)
        losses: dict[str, Tensor] = {}
        for move, which in order.split():
            if move == "F":
                batch = contexts(config, seed=int(which))
                losses[which] = loss_sum(model, exchange, batch, full_spec(config), draw=(7, int(which)))
            else:
                losses[which].backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return sum(loss.item() for loss in losses.values()), found

    return run_ranks(len(world), work)


@pytest.mark.parametrize("world", ["1", "4"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_passes_in_flight_are_two_passes(setting: str, world: str) -> None:
    config = tiny_config(compress=SETTINGS[setting])
    wanted = gradients(config, WORLDS[world], ORDERS["one after the other"])
    for order in ("first in, first out", "mirrored"):
        for (loss, found), (wanted_loss, wanted_found) in zip(
            gradients(config, WORLDS[world], ORDERS[order]), wanted, strict=True
        ):
            assert loss == pytest.approx(wanted_loss, rel=1e-7)
            assert largest_difference(found, wanted_found) < TOLERANCE


def in_flight(config: Config, wire: Wire, rank: int, count: int) -> list[Tensor]:
    """Forwards of so many passes of one rank of `WORLDS["4"]`, none of them followed by its backward yet."""
    model, exchange = small_model(config), exchange_of(config, WORLDS["4"], rank, wire)
    return [
        loss_sum(model, exchange, contexts(config, seed), full_spec(config), draw=(0, seed)) for seed in range(count)
    ]


def test_four_passes_in_flight_over_inboxes_that_validate() -> None:
    """The first owner is through with all four forwards before the others have begun one."""
    config = tiny_config()
    loop = Loop(tiny_config(train={"batch": 8, "micro_batches": 4}), WORLDS["4"])
    first = in_flight(config, loop.wires[0], 0, 4)

    def work(rank: int, _: ThreadWire) -> float:
        losses = first if rank == 0 else in_flight(config, loop.wires[rank], rank, 4)
        for loss in reversed(losses):
            loss.backward()
        return sum(loss.item() for loss in losses)

    total = sum(run_ranks(4, work))
    exchange = exchange_of(config, WORLDS["1"], 0, None)
    with torch.no_grad():
        batches = [contexts(config, seed) for seed in range(4)]
        alone = [loss_sum(small_model(config), exchange, batch, full_spec(config)).item() for batch in batches]
    assert total == pytest.approx(sum(alone), rel=1e-6)
    for inbox in loop.inboxes:
        assert (inbox._held, inbox._admitted, inbox._open) == ({}, set(), set())


def test_a_forward_that_is_abandoned_ends_its_pass() -> None:
    config = tiny_config()
    loop = Loop(config, WORLDS["4"])
    losses = in_flight(config, loop.wires[0], 0, 1)
    assert loop.inboxes[0]._open == {1}
    losses.clear()
    assert loop.inboxes[0]._open == set()


def test_a_pass_is_open_until_its_last_gradient_has_come() -> None:
    """Where θ is handed on, that is θ's gradient."""
    config = tiny_config(compress={"theta": "previous"})
    loop = Loop(config, WORLDS["4"])

    def work(rank: int, _: ThreadWire) -> None:
        (loss,) = in_flight(config, loop.wires[rank], rank, 1)
        assert loop.inboxes[rank]._open == {1}
        torch.autograd.backward(loss)
        assert loop.inboxes[rank]._open == set()

    run_ranks(4, work)


MICRO = {"batch": 4, "micro_batches": 2}


@pytest.mark.parametrize("world", ["1", "zigzag", "4"])
@pytest.mark.parametrize("mode", MODES)
def test_contexts_in_passes_that_overlap_are_contexts_in_one_pass(mode: str, world: str) -> None:
    """In float32: the loss, and every gradient."""
    whole = tiny_config(compress=MODES[mode], train={"batch": 4})
    dealt = tiny_config(compress=MODES[mode], train=MICRO)
    wanted_loss, wanted = loss_and_gradients(whole, WORLDS["1"], contexts(whole))
    loss, found = loss_and_gradients(dealt, WORLDS[world], contexts(dealt))
    assert loss == pytest.approx(wanted_loss, rel=5e-7)  # a sum of sums, in float32
    assert largest_difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("name", SCALED)
def test_passes_that_overlap_round_by_draws_of_their_own(name: str) -> None:
    """Four nodes are as near to one pass in float32 as their format allows."""
    exact = tiny_config(train={"batch": 4})
    dealt = tiny_config(compress={"format": name, "dense_format": "float32"}, train=MICRO)
    _, wanted = loss_and_gradients(exact, WORLDS["1"], contexts(exact))
    _, found = loss_and_gradients(dealt, WORLDS["4"], contexts(dealt))
    assert relative_difference(found, wanted) < GRADIENTS_WITHIN[name]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_wire_carries_the_formula_s_bytes_once_for_each_pass(micro_batches: int) -> None:
    config = tiny_config(train={"batch": 4, "micro_batches": micro_batches})
    payload, spec = payload_format(config), full_spec(config)

    def work(rank: int, wire: ThreadWire) -> int:
        exchange = exchange_of(config, WORLDS["3+1"], rank, wire)
        loss_sum(small_model(config), exchange, contexts(config), spec).backward()
        return sum(wire.sent_bytes.values())

    formula = [step_bytes(payload, Assignment(WORLDS["3+1"]), rank, spec).total for rank in range(2)]
    assert run_ranks(2, work) == [micro_batches * sent for sent in formula]


def test_while_one_pass_waits_another_has_sent() -> None:
    """Before a node waits for what belongs to one pass, it has sent what belongs to the other."""
    config, events = tiny_config(train=MICRO), []

    class Noting(ThreadWire):
        def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
            events.append(("send", kind, layer, key.number))
            super().send(rank, kind, layer, chunk, key, tensors)

        def take(self, kind: str, layer: int, chunk: int, rank: int, number: int, *rest: Any) -> tuple[Tensor, ...]:
            events.append(("take", kind, layer, number))
            return super().take(kind, layer, chunk, rank, number, *rest)

    def work(rank: int, wire: ThreadWire) -> None:
        exchange = exchange_of(config, WORLDS["zigzag"], rank, wire if rank else Noting(wire._post, rank))
        loss_sum(small_model(config), exchange, contexts(config), full_spec(config)).backward()

    run_ranks(2, work)  # rank 0 owns the first chunk and the last: it sends, and it receives
    first = {event: events.index(event) for event in reversed(events)}
    for layer in range(3):
        assert first["send", "kv", layer, 2] < first["take", "kv", layer, 1]
        assert first["send", "grad", layer, 1] < first["take", "grad", layer, 2]
