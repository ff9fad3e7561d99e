"""Training steps without a network: exactness at c = 1, averaging at c > 1, what is said at the barrier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.coordinated import Coordinator, Session, Still, corpus, make_trainer, make_world, train
from helpers.small import largest_difference, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, exchange_of, full_spec, tiny_config
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.plan import TAKE
from netem.errors import ConfigError, RunAborted
from node.config import Config
from node.lab.in_process import go
from node.train.evaluate import heldout_loss
from node.train.from_config import payload_format
from node.train.passes import loss_sum
from node.train.trainer import Trainer


def exact(mode: str, **train_settings: Any) -> Config:
    return tiny_config(compress=MODES[mode], train={"sync_every": 1, **train_settings})


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("world", ["3+1", "4"])
@pytest.mark.parametrize("mode", ["dense", "geodesic", "taylor2, spectral, a basis a head"])
def test_at_c_1_ranks_train_as_one_does(mode: str, world: str, tmp_path: Path) -> None:
    """Through warm start, basis and compressed steps. Adam magnifies what differs in small gradients: measured,
    losses differ by 3e-7 and weights by 2e-5 of a tensor's largest entry after six steps at a rate of 0.01."""
    config = exact(mode)
    one, (single,) = train(config, WORLDS["1"], tmp_path)
    many, trainers = train(config, WORLDS[world], tmp_path)
    assert len(one.losses()) == 6
    assert one.losses()[-1] < one.losses()[0]
    assert many.losses() == pytest.approx(one.losses(), rel=1e-5)
    difference = largest_difference(parameters(trainers[0]), parameters(single))
    off = max(abs(a / b - 1) for a, b in zip(many.losses(), one.losses(), strict=True))
    print(f"losses differ by {off:.1e}, weights by {difference:.1e}")
    assert difference < 1e-3
    for trainer in trainers[1:]:
        assert largest_difference(parameters(trainer), parameters(trainers[0])) == 0.0


def one_step(config: Config, world: str, kinds: list[str], folder: Path) -> list[Trainer]:
    """The first step of fresh trainers, with only these rounds."""
    shared = Coordinator(config, WORLDS[world], 1)
    first = go(config, Assignment(WORLDS[world]), 0)

    def work(rank: int, wire: ThreadWire) -> Trainer:
        payload = payload_format(config)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS[world], wire, Session(shared, rank), folder)
        rounds = [
            entry
            for entry in go(config, Assignment(WORLDS[world]), config.train.sync_every - 1).rounds
            if entry.kind in (*kinds, TAKE)
        ]
        trainer.step(here, type(first)(step=0, generation=1, cursor=0, rounds=rounds))
        return trainer

    return run_ranks(len(WORLDS[world]), work)


@pytest.mark.parametrize("world", ["2x2", "3+1", "1+3", "4"])
def test_between_averagings_the_weighted_mean_of_gradients_is_the_global_one(world: str, tmp_path: Path) -> None:
    """Each rank takes its part times 1 / share: with uneven ownership too, no rank's tokens weigh more."""
    config = tiny_config(compress={"mode": "dense"}, train={"sync_every": 3, "grad_clip": 0.0})

    def gradients(trainer: Trainer) -> dict[str, Tensor]:
        return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    (single,) = one_step(config, "1", [], tmp_path)
    trainers = one_step(config, world, [], tmp_path)
    weights = Assignment(WORLDS[world]).weights()
    mean = {
        name: torch.stack([w * gradients(t)[name] for w, t in zip(weights, trainers, strict=True)]).sum(0)
        for name in gradients(single)
    }
    assert largest_difference(mean, gradients(single)) < 1e-5
    assert largest_difference(gradients(trainers[0]), gradients(single)) > 1e-2


@pytest.mark.parametrize("world", ["3+1", "4"])
def test_an_averaging_round_leaves_all_with_the_weighted_mean_of_weights(world: str, tmp_path: Path) -> None:
    config = tiny_config(compress={"mode": "dense"}, train={"sync_every": 3})
    apart = [parameters(trainer) for trainer in one_step(config, world, [], tmp_path)]
    together = [parameters(trainer) for trainer in one_step(config, world, ["weights"], tmp_path)]
    weights = Assignment(WORLDS[world]).weights()
    mean = {
        name: torch.stack([w * part[name] for w, part in zip(weights, apart, strict=True)]).sum(0) for name in apart[0]
    }
    assert largest_difference(apart[0], apart[1]) > 1e-3
    assert largest_difference(together[0], mean) < 1e-5
    assert all(largest_difference(other, together[0]) == 0.0 for other in together[1:])


def test_what_is_said_at_the_barrier(tmp_path: Path) -> None:
    config = tiny_config(train={"steps": 6, "sync_every": 2, "checkpoint_every": 2, "eval_every": 4})
    shared, trainers = train(config, WORLDS["3+1"], tmp_path)
    said = shared.said[0]
    assert [sorted(digests) for _, digests in said.values()] == [
        ["assignment", "corpus", "weights"],  # before the first step: all start alike, on the same tokens
        [],
        ["weights"],
        ["basis"],
        ["weights"],
        [],
        ["weights"],
    ]
    assert shared.saved == [[2, 4, 6]] * 2
    assert said[0][0] is None
    metrics = [reported for reported, _ in said.values() if reported is not None]
    assert [step for step, entry in enumerate(metrics, 1) if "heldout_loss_sum" in entry] == [1, 4, 6]
    assert [step for step, entry in enumerate(metrics, 1) if "k_energy_kept" in entry] == [3]
    assert 0 < metrics[2]["k_energy_kept"] <= 1
    # Chunks of 4 tokens in the warm start, then of 8; three of four chunks here, in a batch of two contexts.
    assert [entry["tokens"] for entry in metrics] == [24, 24, 48, 48, 48, 48]
    assert all(entry.keys() >= {"loss_sum", "tokens", "grad_norm", "lr", "sent_wire_bytes"} for entry in metrics)
    assert all(float(p.abs().max()) > 0 for _, codec in trainers[0].model.codecs() for p in codec.directions)


@pytest.mark.parametrize("number_format", ["float32", "int8"])
@pytest.mark.parametrize("world", ["1", "3+1"])
@pytest.mark.parametrize("start", [2, 4])
def test_a_resumed_run_goes_on_bit_for_bit(world: str, start: int, number_format: str, tmp_path: Path) -> None:
    """From the end of the warm start (the basis is still to come), and from among compressed steps. Gradients that are
    rounded at random are rounded as they would have been."""
    train_settings = {"steps": 6, "sync_every": 2, "checkpoint_every": 2}
    config = tiny_config(train=train_settings, compress={"format": number_format})
    whole, straight = train(config, WORLDS[world], tmp_path)
    rest, resumed = train(config, WORLDS[world], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    for one, other in zip(resumed, straight, strict=True):
        assert all(torch.equal(parameters(one)[name], parameters(other)[name]) for name in parameters(other))
    assert rest.said[0][start][1]["weights"] == whole.said[0][start][1]["weights"]


def test_a_run_resumed_without_its_moments_would_not(tmp_path: Path) -> None:
    """The test above can fail."""
    config = tiny_config(train={"steps": 6, "sync_every": 2, "checkpoint_every": 2})
    whole, _ = train(config, WORLDS["1"], tmp_path)
    shared = Coordinator(config, WORLDS["1"], 6)

    def work(rank: int, wire: ThreadWire) -> None:
        session, payload = Session(shared, rank), payload_format(config)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS["1"], wire, session, tmp_path)
        trainer.resume(here, 4)
        trainer.optimizer.state.clear()
        trainer.run(here, session, Still())

    run_ranks(1, work)
    assert shared.losses()[0] == whole.losses()[4]
    assert shared.losses()[1] != whole.losses()[5]


@pytest.mark.parametrize("world", ["2x2", "zigzag", "4"])
def test_the_heldout_loss_is_that_of_one_rank(world: str) -> None:
    config = tiny_config()
    task, spec = corpus(), full_spec(config)

    def walk(rank: int, wire: ThreadWire, owners: str) -> tuple[float, int]:
        model = small_model(config)
        return heldout_loss(model, exchange_of(config, WORLDS[owners], rank, wire), task, spec, 2, 1 << 60)

    ((loss, count),) = run_ranks(1, lambda rank, wire: walk(rank, wire, "1"))
    parts = run_ranks(len(WORLDS[world]), lambda rank, wire: walk(rank, wire, world))
    assert count == sum(part for _, part in parts) == (399 // 32 // 2) * 2 * 32
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)


def test_the_heldout_loss_walks_each_context_once() -> None:
    config = tiny_config()
    task, spec = corpus(), full_spec(config)
    model, exchange = small_model(config), exchange_of(config, WORLDS["1"], 0, None)
    total, count = heldout_loss(model, exchange, task, spec, 2, 3)
    assert model.training
    with torch.no_grad():
        batches = [task.heldout_contexts(32, first, 2) for first in (0, 2, 4)]
        assert total == pytest.approx(sum(float(loss_sum(model, exchange, batch, spec)) for batch in batches))
    assert count == 3 * 2 * 32


def test_a_heldout_part_of_less_than_one_batch_is_an_error_that_says_so() -> None:
    """Payloads have the shape of a whole batch: peers would refuse a smaller one."""
    config = tiny_config()
    short = dataclasses.replace(corpus(), heldout=np.zeros(40, np.uint16))
    with pytest.raises(
        ConfigError, match=r"train\.batch = 2: the held-out part .* only 1 contexts of model\.context = 32"
    ):
        heldout_loss(small_model(config), exchange_of(config, WORLDS["1"], 0, None), short, full_spec(config), 2, 1)


def test_a_loss_that_is_no_number_ends_the_run_and_says_so(tmp_path: Path) -> None:
    config = tiny_config(train={"steps": 3, "sync_every": 1})
    shared = Coordinator(config, WORLDS["1"], 3)

    def work(rank: int, wire: ThreadWire) -> None:
        payload = payload_format(config)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS["1"], wire, Session(shared, rank), tmp_path)
        with torch.no_grad():
            trainer.model.norm.weight.fill_(float("nan"))
        with pytest.raises(RunAborted, match="step 1: the loss is nan"):
            trainer.step(here, go(config, Assignment(WORLDS["1"]), 0))

    run_ranks(1, work)
