"""Payloads that readers pass on, over real sockets: nothing but the links that bytes take is another.

Payloads here are cut into more pieces than in a run, where so small ones go whole.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.over_sockets import Rank, run_over_sockets
from helpers.small import contexts, largest_difference, small_config, small_model
from helpers.worlds import full_spec

from coordinator.assignment import Assignment, assign
from netem.profile import NetConfig, resolve
from node.config import Config
from node.exchange import routes
from node.exchange.chunks import ChunkExchange
from node.exchange.payload import link_bytes, step_bytes
from node.train.from_config import payload_format
from node.train.passes import loss_sum

TOLERANCE = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "local": {"mode": "local"},
    "geodesic": {"rotation": "geodesic"},
    "taylor2 per head": {"rotation": "taylor2", "scope": "head"},
    "learned": {"rotation": "fixed", "subspace": "learned"},
    "all layers compressed": {"dense_last_layers": 0},
    "theta of the chunk before": {"theta": "previous", "own": "projected", "generators": 2},
    "exact": {"rotation": "exact", "generator_norm": "spectral", "theta": "first"},
    "only the last layer sees far": {"remote_last_layers": 1, "dense_last_layers": 0},
    "random": {"rotation": "random"},
    "bfloat16": {"format": "bfloat16", "dense_format": "bfloat16"},
    "int8, the last layer in fp8": {"format": "int8", "dense_format": "fp8"},
    "int4": {"mode": "dense", "dense_format": "int4"},
    "top-k": {"mode": "dense", "dense_format": "topk10"},
}
"""Every mode, and every format."""

WORLDS = {"4 nodes": (4, assign(4, 4)), "4 nodes, zigzag": (8, assign(8, 4, "zigzag"))}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LEAST_PIECE_BYTES", 100)


def train_pass(
    config: Config, assignment: Assignment, relays: bool, net: str = "unshaped"
) -> tuple[list[float], list[dict[str, Any]], list[dict[str, int]]]:
    """Loss and gradients of each node, and the payload bytes that its links counted."""
    spec = full_spec(config)
    batch = contexts(config)

    def work(rank: Rank) -> tuple[float, dict[str, Any], dict[str, int]]:
        model = small_model(config)
        exchange = ChunkExchange(assignment, rank.number, payload_format(config), rank.wire)
        loss = loss_sum(model, exchange, batch, spec)
        loss.backward()  # type: ignore[no-untyped-call]
        assert rank.endpoint.flush(10.0)
        sent = {peer: link.payload_bytes for peer, link in rank.endpoint.counters().items()}
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sent

    results = run_over_sockets(config, assignment, work, resolve(NetConfig(profile=net)), relays=relays)
    losses, gradients, sent = zip(*results, strict=True)
    return list(losses), list(gradients), list(sent)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_a_relay_changes_nothing_but_the_bytes_of_each_link(case: str, world: str) -> None:
    """Also the formats that round: each reader sees the bytes that the owner sent, and gradients go straight."""
    chunks, assignment = WORLDS[world]
    config = small_config(**{"mode": "subspace"} | CASES[case], model={"chunks": chunks})
    spec = full_spec(config)
    losses, gradients, _ = train_pass(config, assignment, relays=False)
    relayed_losses, relayed_gradients, sent = train_pass(config, assignment, relays=True)
    assert relayed_losses == losses
    for one, other in zip(relayed_gradients, gradients, strict=True):
        assert largest_difference(one, other) < TOLERANCE
    payload = payload_format(config)
    by_field = link_bytes(payload, assignment, spec, relays=True)
    for rank, links in enumerate(sent):
        formula = [sum(part[rank][peer] for part in by_field) for peer in range(4)]
        assert [links.get(f"node-{peer}", 0) for peer in range(4)] == formula
        assert sum(links.values()) == step_bytes(payload, assignment, rank, spec, relays=True).total
    moved = any(by_field[field] != one for field, one in enumerate(link_bytes(payload, assignment, spec)))
    assert moved == (case != "local"), "something is passed on"


def test_four_nodes_that_relay_equal_one() -> None:
    config = small_config()
    (loss,), (wanted,), _ = train_pass(config, assign(4, 1), relays=True)
    losses, gradients, _ = train_pass(config, assign(4, 4), relays=True)
    total = {name: sum(grads[name] for grads in gradients) for name in wanted}
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    assert largest_difference(total, wanted) < TOLERANCE


def test_a_relay_over_lines_that_are_emulated() -> None:
    """Where lines are narrow, pieces of several payloads are on their way at once, and out of order."""
    config = small_config("dense", batch=4)
    losses, _, _ = train_pass(config, assign(4, 4), relays=False)
    relayed_losses, _, _ = train_pass(config, assign(4, 4), relays=True, net="home-cable")
    assert relayed_losses == losses
