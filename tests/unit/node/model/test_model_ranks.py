"""N ranks compute what one computes, in every mode: loss and every parameter's gradient.

Measured in float32, over all cases: losses differ by 2e-7, gradients by 8e-7 of each tensor's largest entry. (In
other formats see test_format_ranks.)
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from helpers.small import contexts, largest_difference, small_model
from helpers.threads import Post, ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, Loop, exchange_of, full_spec, logits_of, loss_and_gradients, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.config import Config
from node.exchange.formats import TensorSpec
from node.exchange.passes import PassKey
from node.train.passes import loss_sum

TOLERANCE = 1e-5


@cache
def reference(mode: str, **model: Any) -> tuple[Config, float, dict[str, Tensor]]:
    """One rank that owns all chunks: config, loss and gradients."""
    config = tiny_config(compress=MODES[mode], model=model)
    return config, *loss_and_gradients(config, [range(config.model.chunks)], contexts(config))


def assert_equals_one_rank(mode: str, world: Sequence[Sequence[int]], **model: Any) -> None:
    config, loss, gradients = reference(mode, **model)
    found_loss, found = loss_and_gradients(config, world, contexts(config))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    difference = largest_difference(found, gradients)
    print(f"{mode}, {world}: loss off by {abs(found_loss / loss - 1):.1e}, gradients by {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "1"])
@pytest.mark.parametrize("mode", MODES)
def test_n_ranks_equal_one(mode: str, world: str) -> None:
    assert_equals_one_rank(mode, WORLDS[world])


@pytest.mark.parametrize("mode", ["dense", "geodesic", "taylor2, spectral, a basis a head"])
def test_two_chunks_on_two_ranks_equal_one(mode: str) -> None:
    assert_equals_one_rank(mode, [[0], [1]], chunks=2, kv_heads=4)


@pytest.mark.parametrize("mode", ["dense", "geodesic"])
def test_ranks_may_own_chunks_in_any_pattern(mode: str) -> None:
    assert_equals_one_rank(mode, [[1, 4], [0, 5, 6], [2, 3, 7]], chunks=8, kv_heads=1)


@settings(max_examples=12, deadline=None)
@given(owners=st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_any_ownership_equals_one_rank(owners: list[int]) -> None:
    """Eight chunks, each on any of three ranks; ranks that own none are not there."""
    world = [[chunk for chunk, owner in enumerate(owners) if owner == rank] for rank in range(3)]
    assert_equals_one_rank("geodesic", [own for own in world if own], chunks=8, kv_heads=1)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "local"])
def test_every_parameter_has_a_gradient_and_remote_chunks_matter(mode: str) -> None:
    """Else the tests above would prove little."""
    _, loss, gradients = reference(mode)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    _, local_loss, local_gradients = reference("local")
    assert abs(loss - local_loss) > 1e-6 * loss
    shared = {name: gradients[name] for name in local_gradients}
    assert largest_difference(shared, local_gradients) > 100 * TOLERANCE


def test_theta_turns_the_basis_within_its_clip() -> None:
    """The models of these tests have θ that is neither 0 nor cut off."""
    config = tiny_config()
    model = small_model(config)
    for _, codec in model.codecs():
        z = torch.randn(4, 2, 8, config.model.d_kv, generator=torch.Generator().manual_seed(1)) * 0.1
        _, theta = codec.encode(z, (0, 1, 2, 3))
        assert 1e-3 < float(theta.detach().abs().median()) < 0.5


def test_bfloat16_payloads_keep_the_loss() -> None:
    """Own later chunks see what others get: the forward is the same function."""
    config = tiny_config(compress={"format": "bfloat16"})
    loss, gradients = loss_and_gradients(config, WORLDS["1"], contexts(config))
    for world in ("2x2", "4"):
        found_loss, found = loss_and_gradients(config, WORLDS[world], contexts(config))
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert largest_difference(found, gradients) < 0.02


class Shuffled(ThreadWire):
    """Lets chunks arrive in a given order: waits for all of them, then hands them over one by one."""

    def __init__(self, post: Post, rank: int, order: tuple[int, ...]) -> None:
        super().__init__(post, rank)
        self._order = order

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        for chunk, owner in chunks.items():
            super().first_of(kind, layer, {chunk: owner}, number)
        return min(chunks, key=self._order.index)


@pytest.mark.parametrize("mode", ["dense", "geodesic", "learned"])
def test_the_order_of_arrival_changes_no_bit(mode: str) -> None:
    config = tiny_config(compress=MODES[mode])

    def run(order: tuple[int, ...]) -> list[dict[str, Tensor]]:
        def work(rank: int, wire: ThreadWire) -> dict[str, Tensor]:
            model = small_model(config)
            shuffled = Shuffled(wire._post, rank, order)
            loss = loss_sum(
                model, exchange_of(config, WORLDS["4"], rank, shuffled), contexts(config), full_spec(config)
            )
            loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": loss.detach()}

        return run_ranks(4, work)

    wanted = run((0, 1, 2))
    for order in list(itertools.permutations(range(3)))[1:]:
        for found, expected in zip(run(order), wanted, strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected), order


class Watchful(ThreadWire):
    """Keeps what was sent, to see whether it is written to afterwards: an endpoint sends it later, perhaps twice."""

    sent: list[tuple[Tensor, Tensor]]

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        self.sent += [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
        super().send(rank, kind, layer, chunk, key, tensors)


@pytest.mark.parametrize("mode", ["dense", "geodesic"])
def test_what_was_sent_is_not_written_to(mode: str) -> None:
    config = tiny_config(compress=MODES[mode])

    def work(rank: int, wire: ThreadWire) -> int:
        watchful = Watchful(wire._post, rank)
        watchful.sent = []
        model = small_model(config)
        loss_sum(
            model, exchange_of(config, WORLDS["zigzag"], rank, watchful), contexts(config), full_spec(config)
        ).backward()
        assert all(torch.equal(tensor, copy) for tensor, copy in watchful.sent)
        return len(watchful.sent)

    assert all(run_ranks(2, work))


@pytest.mark.parametrize("mode", ["dense", "geodesic", "random"])
def test_under_bf16_autocast_ranks_equal_one_and_payloads_keep_their_dtype(mode: str) -> None:
    """As on a GPU. `ThreadWire` refuses a tensor that is not of the dtype which the payload's format gives it."""
    config = tiny_config(compress=MODES[mode] | {"format": "bfloat16"})

    def logits(rank: int, wire: ThreadWire, world: Sequence[Sequence[int]]) -> Tensor:
        model = small_model(config)
        exchange = exchange_of(config, world, rank, wire)
        tokens = torch.from_numpy(contexts(config)[:, :-1])
        own = torch.stack([tokens[:, chunk * 8 : (chunk + 1) * 8] for chunk in exchange.own])
        with torch.autocast("cpu", torch.bfloat16):
            found = logits_of(model, own, exchange, full_spec(config))
        found.float().square().sum().backward()
        return found.detach().float()

    (whole,) = run_ranks(1, lambda rank, wire: logits(rank, wire, WORLDS["1"]))
    parts = torch.cat(run_ranks(4, lambda rank, wire: logits(rank, wire, WORLDS["4"])))
    assert float((parts - whole).abs().max() / whole.abs().max()) < 0.02  # a bf16 has 8 bits; measured: 5e-3


def test_over_real_wires_and_inboxes_ranks_equal_one() -> None:
    """Tags, buffers and admission in between, no sockets. Two passes, as in training."""
    config = tiny_config(compress={"format": "float32"})
    loss, gradients = loss_and_gradients(config, WORLDS["1"], contexts(config))
    loop = Loop(config, WORLDS["zigzag"])

    def work(rank: int, _: ThreadWire) -> tuple[float, dict[str, Tensor]]:
        model = small_model(config)
        exchange = exchange_of(config, WORLDS["zigzag"], rank, loop.wires[rank])
        for _ in range(2):
            model.zero_grad()
            total = loss_sum(model, exchange, contexts(config), full_spec(config))
            total.backward()
        return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    parts = run_ranks(2, work)
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    found = {name: parts[0][1][name] + parts[1][1][name] for name in gradients}
    assert largest_difference(found, gradients) < TOLERANCE


class Log:
    """The wire of a rank that receives nothing: what it does, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def begin(self, number: int) -> None:
        self.events.append(("begin", number))

    def end(self, number: int) -> None:
        self.events.append(("end", number))

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        if layer == 0:
            self.events.append((kind, chunk, rank))

    def publish(
        self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]
    ) -> None:
        for rank in ranks:
            self.send(rank, "kv", layer, chunk, key, tensors)

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        assert kind == "done"
        self.events.append(("await", number, chunk, rank))
        return ()


def test_the_first_owner_waits_for_its_readers_of_two_passes_ago() -> None:
    """Without gradients to wait for, it would else run ahead and fill their memory."""
    config, log = tiny_config(), Log()
    exchange = exchange_of(config, [[0, 1], [2], [3]], 0, log)  # type: ignore[arg-type]
    model = small_model(config)
    with torch.no_grad():
        for _ in range(4):
            loss_sum(model, exchange, contexts(config), full_spec(config))
    sends = [("kv", chunk, rank) for chunk in (0, 1) for rank in (1, 2)]
    waits = {done: [("await", done, chunk, rank) for chunk in (0, 1) for rank in (1, 2)] for done in (1, 2)}
    assert log.events == [
        ("begin", 1),
        *sends,
        ("begin", 2),
        *sends,
        ("begin", 3),
        *waits[1],
        ("end", 1),
        *sends,
        ("begin", 4),
        *waits[2],
        ("end", 2),
        *sends,
    ]


@pytest.mark.parametrize("world", ["3+1", "4"])
def test_no_rank_runs_more_than_two_passes_ahead(world: str) -> None:
    """Ten passes without gradients and one with, over inboxes that refuse what is too far ahead. The last rank does not
    begin until the first has to wait."""
    config = tiny_config()
    loop = Loop(config, WORLDS[world])
    first_waits = threading.Event()
    reached: list[int] = []
    wire, take = loop.wires[0], loop.wires[0].take

    def waits(kind: str, *rest: Any) -> tuple[Tensor, ...]:
        if kind == "done" and not first_waits.is_set():
            reached.append(loop.inboxes[0]._newest)
            first_waits.set()
        return take(kind, *rest)

    wire.take = waits  # type: ignore[method-assign, assignment]

    def work(rank: int, _: ThreadWire) -> float:
        model, exchange = small_model(config), exchange_of(config, WORLDS[world], rank, loop.wires[rank])
        if rank == len(loop.names) - 1:
            assert first_waits.wait(30)
        total = 0.0
        with torch.no_grad():
            for _ in range(10):
                total += float(loss_sum(model, exchange, contexts(config), full_spec(config)))
        loss_sum(model, exchange, contexts(config), full_spec(config)).backward()
        return total

    whole = run_ranks(len(loop.names), work)
    loss, _ = loss_and_gradients(config, WORLDS["1"], contexts(config))
    assert sum(whole) == pytest.approx(10 * loss, rel=1e-6)
    assert reached == [3]
