"""What a chunk sees of itself, and what its θ is made of: which combinations let early tokens know of later ones."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from helpers.small import VOCAB, contexts, largest_difference, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, exchange_of, full_spec, logits_of, loss_and_gradients, tiny_config
from torch import Tensor

from coordinator.assignment import Assignment
from netem.errors import ProtocolError
from node.config import Config
from node.exchange.inbox import Inbox, Members
from node.exchange.payload import step_bytes
from node.exchange.tags import ChunkTag, encode_tag
from node.train.from_config import payload_format
from node.train.passes import loss_sum

CHUNK = 8
ROTATIONS = ("geodesic", "taylor2", "exact", "fixed", "random")
COMBINATIONS = [
    {"rotation": rotation, "theta": theta, "own": own}
    for rotation, theta, own in itertools.product(ROTATIONS, ("chunk", "previous", "first"), ("exact", "projected"))
    if theta == "chunk" or rotation not in ("fixed", "random")
]
LEAKING = [
    {"rotation": rotation, "theta": "chunk", "own": "projected"} for rotation in ("geodesic", "taylor2", "exact")
]
PREVIOUS = {"theta": "previous"}


def logits(config: Config, tokens: Tensor, world: str) -> Tensor:
    """[B, T, vocab]"""

    def work(rank: int, wire: ThreadWire) -> Tensor:
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        own = torch.stack([tokens[:, chunk * CHUNK : (chunk + 1) * CHUNK] for chunk in exchange.own])
        with torch.no_grad():
            return logits_of(small_model(config), own, exchange, full_spec(config))

    order = torch.tensor([chunk for own in WORLDS[world] for chunk in own])
    return torch.cat(run_ranks(len(WORLDS[world]), work))[order.argsort()].movedim(0, 1).flatten(1, 2)


def seen_too_early(config: Config, world: str) -> set[int]:
    """Tokens of the second chunk whose change reaches a logit before them."""
    tokens = torch.from_numpy(contexts(config)[:, :-1])
    base, found = logits(config, tokens, world), set()
    for place in (CHUNK + 3, 2 * CHUNK - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        other = logits(config, changed, world)
        assert not torch.equal(other[:, place], base[:, place])
        if not torch.equal(other[:, :place], base[:, :place]):
            found.add(place)
    return found


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: ", ".join(c.values()))
def test_which_combinations_leak(combination: dict[str, Any]) -> None:
    """To the bit where they do not. Where they do, every later token of the chunk is seen, and the config says so."""
    config = tiny_config(compress=combination)
    found = seen_too_early(config, "1")
    assert config.leaks == (combination in LEAKING)
    assert found == ({CHUNK + 3, 2 * CHUNK - 1} if config.leaks else set())


def test_the_own_chunk_is_projected_and_not_rounded() -> None:
    """The first chunk attends to itself alone: how payloads are rounded on their way to others changes none of it."""
    settings = {"own": "projected", "rotation": "fixed", "dense_last_layers": 0}
    exact, rounded = (tiny_config(compress=settings | {"format": name}) for name in ("float32", "int4"))
    tokens = torch.from_numpy(contexts(exact)[:, :-1])
    found, wanted = logits(rounded, tokens, "1"), logits(exact, tokens, "1")
    assert torch.equal(found[:, :CHUNK], wanted[:, :CHUNK])
    assert not torch.equal(found[:, CHUNK:], wanted[:, CHUNK:])


@pytest.mark.parametrize("combination", [LEAKING[0], {"own": "projected", **PREVIOUS}], ids=["leaks", "causal"])
def test_it_is_the_same_on_four_ranks(combination: dict[str, Any]) -> None:
    config = tiny_config(compress=combination)
    assert seen_too_early(config, "4") == seen_too_early(config, "1")


def test_what_does_not_turn_or_compress_does_not_leak() -> None:
    assert tiny_config(compress=LEAKING[0]).leaks
    for other in ({"clip": 0.0}, {"mode": "dense"}, {"mode": "local"}):
        assert not tiny_config(compress=LEAKING[0] | other).leaks


def test_a_leak_is_said_in_the_nodes_log(caplog: pytest.LogCaptureFixture) -> None:
    from node.worker.node import warn_of_leak

    with caplog.at_level(logging.WARNING, "isthmus.node"):
        warn_of_leak(tiny_config(compress={"own": "projected", "theta": "first"}))
        assert not caplog.records
        warn_of_leak(tiny_config(compress=LEAKING[0]))
    assert "leaks" in caplog.text


def test_projected_passes_the_own_chunk_through_the_subspace() -> None:
    """In a context of one chunk nothing else attends: exact and projected differ, and agree where the rank is full."""
    model = {"context": 8, "chunks": 1}

    def loss(**compress: Any) -> float:
        config = tiny_config(model=model, compress={"rotation": "fixed"} | compress)
        return loss_and_gradients(config, [[0]], contexts(config))[0]

    assert abs(loss(own="projected") / loss(own="exact") - 1) > 1e-6
    full = {"k_share": 0.0, "v_share": 0.0}
    assert loss(own="projected", **full) == pytest.approx(loss(own="exact", **full), rel=1e-6)


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "1"])
def test_theta_is_of_the_chunk_before_whoever_owns_it(world: str) -> None:
    """`previous` shifts the θ that `chunk` would have by one chunk, and starts from 0."""

    def thetas(source: str, world: str) -> Tensor:
        config = tiny_config(compress={"theta": source, "own": "projected"}, model={"layers": 2})

        def work(rank: int, wire: ThreadWire) -> Tensor:
            model, exchange = small_model(config), exchange_of(config, WORLDS[world], rank, wire)
            seen: list[Tensor] = []
            codec = next(codec for _, codec in model.codecs())
            compress = codec.compress
            codec.compress = lambda z, theta: seen.append(theta) or compress(z, theta)  # type: ignore[method-assign]
            with torch.no_grad():
                loss_sum(model, exchange, contexts(config), full_spec(config))
            return seen[0]

        order = torch.tensor([chunk for own in WORLDS[world] for chunk in own])
        return torch.cat(run_ranks(len(WORLDS[world]), work))[order.argsort()]

    own, handed = thetas("chunk", "1"), thetas("previous", world)
    assert torch.count_nonzero(handed[0]) == 0
    assert torch.equal(handed[1:], own[:-1])
    assert float(own.abs().min()) > 0


@pytest.mark.parametrize("world", WORLDS)
def test_theta_that_is_handed_on_is_counted(world: str) -> None:
    """By hand: float32 of K and V for two contexts, in two layers, at each border between owners, once each way."""
    config = tiny_config(compress=PREVIOUS)
    plain, spec = tiny_config(), full_spec(config)
    assignment = Assignment(WORLDS[world])

    def work(rank: int, wire: ThreadWire) -> tuple[int, int]:
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        loss_sum(small_model(config), exchange, contexts(config), spec).backward()
        return wire.sent_bytes["theta"], wire.sent_bytes["dtheta"]

    each = 2 * 2 * 4 * 2
    for rank, counted in enumerate(run_ranks(assignment.n_ranks, work)):
        owns = [assignment.owner(chunk) == rank for chunk in range(4)]
        onward = sum(one and not other for one, other in itertools.pairwise(owns))
        back = sum(other and not one for one, other in itertools.pairwise(owns))
        assert counted == (each * onward, each * back)
        without = step_bytes(payload_format(plain), assignment, rank, spec)
        formula = step_bytes(payload_format(config), assignment, rank, spec)
        assert formula.compressed_forward == without.compressed_forward + counted[0]
        assert formula.compressed_backward == without.compressed_backward + counted[1]
        assert formula.total == without.total + sum(counted)


@pytest.mark.parametrize("world", ["zigzag", "4"])
def test_over_real_wires_theta_is_handed_on_and_counted(world: str) -> None:
    config = tiny_config(compress=PREVIOUS | {"own": "projected"})
    loss, gradients = loss_and_gradients(config, WORLDS["1"], contexts(config))
    loop = Loop(config, WORLDS[world])

    def work(rank: int, _: ThreadWire) -> tuple[float, dict[str, Tensor], dict[str, int]]:
        model, wire = small_model(config), loop.wires[rank]
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        with torch.no_grad():
            for _ in range(3):  # passes without a backward too: nobody runs away
                loss_sum(model, exchange, contexts(config), full_spec(config))
        total = loss_sum(model, exchange, contexts(config), full_spec(config))
        total.backward()
        return total.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wire.sent_bytes

    parts = run_ranks(len(loop.names), work)
    assert sum(part for part, _, _ in parts) == pytest.approx(loss, rel=1e-6)
    found = {name: torch.stack([part[name] for _, part, _ in parts]).sum(0) for name in gradients}
    assert largest_difference(found, gradients) < 1e-5
    for rank, (_, _, sent) in enumerate(parts):
        formula = step_bytes(payload_format(config), Assignment(WORLDS[world]), rank, full_spec(config))
        assert sent["compressed"] == formula.compressed_forward + formula.compressed_backward
        dense = full_spec(config)._replace(compressed=False)
        plain = step_bytes(payload_format(config), Assignment(WORLDS[world]), rank, dense)
        assert sent["uncompressed"] == plain.total


@pytest.mark.parametrize(
    ("theta", "kind", "chunk", "layer", "sender", "compressed", "message"),
    [
        ("chunk", "theta", 1, 0, 1, True, "does not send"),
        ("previous", "theta", 1, 0, 1, True, None),
        ("previous", "dtheta", 2, 1, 3, True, None),
        ("previous", "theta", 0, 0, 0, True, "does not owe"),  # two chunks away
        ("previous", "dtheta", 1, 0, 3, True, "does not owe"),
        ("previous", "theta", 3, 0, 3, True, "does not owe"),  # the last chunk has nobody after it
        ("previous", "theta", 1, 2, 1, True, "does not send"),  # the last layer sends dense
        ("previous", "theta", 1, 0, 1, False, "does not send"),
    ],
)
def test_what_an_inbox_admits(
    theta: str, kind: Any, chunk: int, layer: int, sender: int, compressed: bool, message: str | None
) -> None:
    """At rank 2 of four ranks of one chunk each."""
    payload = payload_format(tiny_config(compress={"theta": theta}))
    inbox = Inbox(payload, 1 << 20)
    inbox.enter(Members(1, Assignment(WORLDS["4"]), 2, ("a", "b", "c", "d")))
    tag = encode_tag(ChunkTag(kind, 1, layer, chunk, 8 if compressed else 4, compressed, "float32", ((2, 2),)))
    if message is None:
        room = inbox.admit("abcd"[sender], 1, tag, 16)
        assert room is not None
        assert len(room) == 16
    else:
        with pytest.raises(ProtocolError, match=message):
            inbox.admit("abcd"[sender], 1, tag, 16)
