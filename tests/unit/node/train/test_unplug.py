"""Unplugging: warm start, compressed steps, and a tail that sends K and V whole, each as the schedule says.

Steps 1 and 2 are the warm start, 3 and 4 compress, 5 and 6 are unplugged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import corpus, train
from helpers.small import contexts, largest_difference, schedule_of, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, Loop, exchange_of, tiny_config
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.records.folder import CONFIG, checkpoint_folder, mark_complete
from node.commands.evaluate import evaluate
from node.config import Config, save_config
from node.data import open_data
from node.exchange.passes import PassSpec
from node.exchange.payload import step_bytes
from node.train.checkpoint import Checkpoints
from node.train.evaluate import heldout_loss
from node.train.from_config import drawn_model, payload_format
from node.train.optimizer import make_optimizer
from node.train.passes import loss_sum
from node.train.trainer import Trainer

PHASES = {2: PassSpec(4, False), 4: PassSpec(8, True), 6: PassSpec(8, False)}
"""A step of each phase, and its passes."""


def unplugging(train: dict[str, Any] | None = None, **compress: Any) -> Config:
    return tiny_config(compress={"unplug_step": 4} | compress, train=train or {})


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Those of the last step."""
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_phases_of_a_run() -> None:
    config = unplugging()
    specs = [schedule_of(config).pass_spec(step) for step in range(1, 7)]
    assert specs == [PHASES[2]] * 2 + [PHASES[4]] * 2 + [PHASES[6]] * 2
    assert [config.compress.is_unplugged_at(step) for step in range(1, 7)] == [False] * 4 + [True] * 2
    names = ["warm start, uncompressed"] * 2 + [""] * 2 + ["unplugged, uncompressed"] * 2
    assert [schedule_of(config).phase(step) for step in range(1, 7)] == names
    assert not any(unplugging(unplug_step=0).compress.is_unplugged_at(step) for step in range(1, 7))


def test_no_basis_is_refreshed_that_will_not_be_used() -> None:
    steps = {"steps": 12, "sync_every": 2}
    config, ever = unplugging(steps, unplug_step=8, refresh_every=2), unplugging(steps, unplug_step=0, refresh_every=2)
    assert [step for step in range(1, 13) if schedule_of(ever).refreshes(step)] == [5, 7, 9, 11]
    assert [step for step in range(1, 13) if schedule_of(config).refreshes(step)] == [5, 7]
    assert [step for step in range(1, 13) if "basis" in schedule_of(config).rounds(step)] == [3, 5, 7]
    assert [step for step in range(1, 13) if schedule_of(config).samples_moments(step)] == [3, 4, 5, 6, 7, 8]
    chosen = unplugging(steps, unplug_step=8, budget_bytes_per_token=64.0)
    assert [step for step in range(1, 13) if "ranks" in schedule_of(chosen).rounds(step)] == [3]


def test_the_tail_decays_anew_from_a_lower_rate() -> None:
    settings = {"lr": 1.0, "steps": 24, "lr_warmup_steps": 4, "lr_final_share": 0.2}
    whole = [schedule_of(unplugging(settings, unplug_step=0)).learning_rate(step) for step in range(1, 25)]
    tail = [
        schedule_of(unplugging(settings, unplug_step=14, unplug_lr_share=0.25)).learning_rate(step)
        for step in range(1, 25)
    ]
    assert tail[:14] == whole[:14]
    assert tail[14:] == pytest.approx([0.25 * (1.0 - 0.08 * done) for done in range(1, 11)])
    ordinary = [
        schedule_of(unplugging(settings, unplug_step=14, unplug_lr_share=1.0)).learning_rate(step)
        for step in range(1, 25)
    ]
    assert ordinary == whole, "the rate never rises"
    early = [schedule_of(unplugging(settings, unplug_step=3)).learning_rate(step) for step in range(1, 25)]
    assert early == whole, "before the warm-up of the rate is over, too"


@pytest.mark.parametrize("world", ["2x2", "4"])
@pytest.mark.parametrize(
    "mode", ["geodesic", "own projected, theta of the chunk before", "only the last layer sees far, compressed"]
)
def test_ranks_train_as_one_does_through_all_phases(mode: str, world: str, tmp_path: Path) -> None:
    """Adam magnifies what differs in small gradients, as in test_trainer."""
    config = unplugging({"sync_every": 1}, **MODES[mode])
    one, (single,) = train(config, WORLDS["1"], tmp_path)
    many, trainers = train(config, WORLDS[world], tmp_path)
    assert len(one.losses()) == 6
    assert many.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert not any("psi" in name for name in gradients(single)), "theta is still in use"
    for trainer in trainers:
        assert largest_difference(gradients(trainer), gradients(single)) < 1e-3
        assert largest_difference(weights(trainer), weights(single)) < 1e-3


@pytest.mark.parametrize("step", PHASES)
def test_losses_and_gradients_of_ranks_are_those_of_one_in_each_phase(step: int) -> None:
    """From the same weights: in float32 to rounding."""
    config = unplugging()
    batch = contexts(config)[:, : PHASES[step].tokens * config.model.chunks + 1]

    def work(rank: int, wire: ThreadWire, world: str) -> tuple[float, dict[str, Tensor]]:
        model = small_model(config)
        loss = loss_sum(
            model, exchange_of(config, WORLDS[world], rank, wire), batch, schedule_of(config).pass_spec(step)
        )
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ((loss, whole),) = run_ranks(1, lambda rank, wire: work(rank, wire, "1"))
    assert any("psi" in name for name in whole) == PHASES[step].compressed
    parts = run_ranks(2, lambda rank, wire: work(rank, wire, "2x2"))
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    total = {name: parts[0][1][name] + parts[1][1][name] for name in whole}
    assert largest_difference(total, whole) < 1e-5


@pytest.mark.parametrize("compress", [{}, {"format": "int8", "dense_format": "bfloat16"}], ids=str)
@pytest.mark.parametrize("step", PHASES)
def test_each_phase_sends_the_bytes_of_the_formula_and_is_let_in(step: int, compress: dict[str, str]) -> None:
    """Over inboxes that validate what comes."""
    config, world = unplugging(**compress), WORLDS["3+1"]
    loop, spec = Loop(config, world), schedule_of(config).pass_spec(step)
    batch = contexts(config)[:, : spec.tokens * config.model.chunks + 1]

    def work(rank: int, _: ThreadWire) -> dict[str, int]:
        exchange = exchange_of(config, world, rank, loop.wires[rank])
        loss_sum(small_model(config), exchange, batch, spec).backward()
        return dict(loop.wires[rank].sent_bytes)

    payload = payload_format(config)
    for rank, counted in enumerate(run_ranks(2, work)):
        formula = step_bytes(payload, Assignment(world), rank, spec)
        assert counted.get("compressed", 0) == formula.compressed_forward + formula.compressed_backward
        assert counted.get("dense", 0) == formula.dense_forward + formula.dense_backward
        assert (counted.get("compressed", 0) > 0) == (counted.get("replaced", 0) > 0) == spec.compressed
    whole = 2 * config.train.batch * spec.tokens * config.model.d_kv * (2 if compress else 4)
    assert (payload.chunk_bytes(0, spec) == whole) == (not spec.compressed)


def test_what_is_unplugged_does_not_know_its_basis_and_leaves_theta_alone(tmp_path: Path) -> None:
    config = unplugging({"sync_every": 1, "weight_decay": 0.5, "checkpoint_every": 4})
    _, (trainer,) = train(config, WORLDS["1"], tmp_path)
    before = drawn_model(config, 101)
    Checkpoints(tmp_path, 0).load(4, before, make_optimizer(before, config.train))
    after = weights(trainer)
    for name, parameter in before.named_parameters():
        assert torch.equal(after[name], parameter) == ("psi" in name), name

    exchange, batch = exchange_of(config, WORLDS["1"], 0, None), contexts(config)
    with torch.no_grad():
        losses = []
        for seed in (1, 2):
            for _, codec in trainer.model.codecs():
                rows = torch.randn(
                    codec.shape.groups, 40, codec.shape.width, generator=torch.Generator().manual_seed(seed)
                )
                codec.set_moments(rows.mT @ rows)
                torch.nn.init.normal_(codec.psi)
            losses.append([loss_sum(trainer.model, exchange, batch, PHASES[step]).item() for step in (4, 6)])
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]


@pytest.mark.parametrize("compress", [{}, {"format": "int8", "refresh_every": 2}], ids=str)
@pytest.mark.parametrize("world", ["1", "3+1"])
@pytest.mark.parametrize("start", [2, 4, 6])
def test_a_run_resumed_at_the_border_goes_on_bit_for_bit(
    start: int, world: str, compress: dict[str, Any], tmp_path: Path
) -> None:
    """From the end of the warm start, from the last compressed step, and from within the tail."""
    config = unplugging({"steps": 8, "sync_every": 2, "checkpoint_every": 2}, **compress)
    whole, straight = train(config, WORLDS[world], tmp_path)
    rest, resumed = train(config, WORLDS[world], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    for one, other in zip(resumed, straight, strict=True):
        assert all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(other))
    assert rest.said[0][start][1].keys() == {"assignment", "corpus", "weights", "basis"}


def test_evaluations_are_in_the_mode_of_their_step(tmp_path: Path) -> None:
    config = unplugging({"sync_every": 2, "eval_every": 2, "checkpoint_every": 2})
    run, (trainer,) = train(config, WORLDS["1"], tmp_path)
    for step, spec in PHASES.items():
        Checkpoints(tmp_path, 0).load(step, trainer.model, trainer.optimizer)
        exchange = exchange_of(config, WORLDS["1"], 0, None)
        expected, _ = heldout_loss(trainer.model, exchange, corpus(), spec, 2, config.train.eval_batches)
        said = run.said[0][step][0] or {}
        assert said["heldout_loss_sum"] == expected
        assert ("layer0_k_energy_kept" in said) == spec.compressed
        assert "layer0_k_stable_rank" in said


def test_eval_of_a_checkpoint_is_in_its_mode(tmp_path: Path) -> None:
    """The same weights saved after a compressed step, and after an unplugged one; and a model that leaks until then."""
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 200)
    config = tiny_config(
        compress={"unplug_step": 4, "own": "projected"},
        data={"corpus": str(text), "tokenizer": "bytes", "cache": str(tmp_path / "cache")},
        run={"outputs": str(tmp_path)},
    )
    task, folder, results = open_data(config.data), config.run.folder, {}
    model = drawn_model(config, task.vocab_size)
    for number, (_, codec) in enumerate(model.codecs()):
        rows = torch.randn(1, 40, codec.shape.width, generator=torch.Generator().manual_seed(number))
        codec.set_moments(rows.mT @ rows)
    for step in (4, 6):
        Checkpoints(folder, 0).save(step, model, make_optimizer(model, config.train))
        save_config(config, folder / CONFIG)
        mark_complete(folder, step, nodes=1)
        results[step] = evaluate(checkpoint_folder(folder, step), 2)
        total, count = heldout_loss(model, exchange_of(config, WORLDS["1"], 0, None), task, PHASES[step], 2, 2)
        assert results[step].loss == pytest.approx(total / count)
    assert results[4].loss != results[6].loss
    assert (results[4].leaks, results[6].leaks) == (True, False)
