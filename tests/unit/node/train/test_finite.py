"""A step that is not finite is taken by no node, and nothing that is not finite is written or read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_files import rewrite
from helpers.coordinated import Coordinator, Session, Still, make_trainer, make_world
from helpers.small import VOCAB, schedule_of, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, tiny_config
from torch import Tensor

from coordinator.messages import Go
from coordinator.plan import TAKE
from coordinator.records.folder import checkpoint_folder, mark_complete
from netem.errors import ConfigError, RunAborted
from node.config import Config, TrainConfig
from node.model.exchanged import ExchangedLlama
from node.train.attempt import Metrics
from node.train.checkpoint import Checkpoints, load_model
from node.train.finite import MOST_SKIPPED, StepGuard, first_nonfinite
from node.train.from_config import drawn_model, payload_format
from node.train.optimizer import make_optimizer
from node.train.trainer import Trainer
from node.train.world import World

NAN = float("nan")


def spoiled(trainer: Trainer, step: int, value: float) -> None:
    """One entry of one gradient of this trainer is `value` at `step`."""
    whole_step, parameter = trainer.step, trainer.model.norm.weight
    spoil = parameter.register_post_accumulate_grad_hook

    def hook(tensor: Tensor) -> None:
        assert tensor.grad is not None
        tensor.grad[3] = value

    def step_with_fault(world: World, go: Go) -> Metrics:
        handle = spoil(hook) if go.step + 1 == step else None
        try:
            return whole_step(world, go)
        finally:
            if handle:
                handle.remove()

    trainer.step = step_with_fault  # type: ignore[method-assign]


def run(config: Config, world: str, folder: Path, value: float = NAN) -> tuple[Coordinator, list[Trainer]]:
    """Six steps; the last rank's gradient has a fault at step 4."""
    shared = Coordinator(config, WORLDS[world], 6)

    def work(rank: int, wire: ThreadWire) -> Trainer:
        session = Session(shared, rank)
        payload = payload_format(config)
        here, trainer = make_world(payload, WORLDS[world], wire, session, folder), make_trainer(config, payload)
        if rank == len(WORLDS[world]) - 1:
            spoiled(trainer, 4, value)
        trainer.run(here, session, Still())
        return trainer

    return shared, run_ranks(len(WORLDS[world]), work)


@pytest.mark.parametrize("value", [NAN, float("inf"), 3e38], ids=str)
@pytest.mark.parametrize(("world", "every"), [("1", 1), ("1", 2), ("3+1", 1), ("3+1", 2)])
def test_a_step_is_skipped_by_all_nodes(world: str, every: int, value: float, tmp_path: Path) -> None:
    """The value 3e38 is finite, and the norm of the gradient that holds it is not."""
    config = tiny_config(train={"sync_every": every, "nonfinite": "skip"})
    shared, trainers = run(config, world, tmp_path, value)
    for said in shared.said:
        skipped = [step for step, (metrics, _) in said.items() if metrics is not None and "skipped" in metrics]
        assert skipped == [4]
    for trainer in trainers:
        assert not first_nonfinite(dict(trainer.model.named_parameters()))
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} <= {3, 5}  # ψ starts after step 2


def test_where_gradients_are_averaged_a_loss_that_is_not_finite_reaches_all_nodes(tmp_path: Path) -> None:
    """Its gradient may be finite, and then no other node would know."""
    config = tiny_config(train={"sync_every": 1, "nonfinite": "skip"})
    shared = Coordinator(config, WORLDS["3+1"], 6)

    def work(rank: int, wire: ThreadWire) -> None:
        session = Session(shared, rank)
        payload = payload_format(config)
        here, trainer = make_world(payload, WORLDS["3+1"], wire, session, tmp_path), make_trainer(config, payload)
        fault = trainer._guard.fault

        def infinite(step: int, loss: Tensor, gradients: Mapping[str, Tensor]) -> str:
            return fault(step, torch.tensor(float("inf")) if step == 4 and rank == 1 else loss, gradients)

        trainer._guard.fault = infinite  # type: ignore[method-assign]
        trainer.run(here, session, Still())

    run_ranks(2, work)
    for said in shared.said:
        assert [step for step, (metrics, _) in said.items() if metrics is not None and "skipped" in metrics] == [4]


def test_a_step_is_refused_by_the_node_that_has_the_fault(tmp_path: Path) -> None:
    for every in (1, 2):
        with pytest.raises(RunAborted, match=r"^step 4: the gradient of norm\.weight is not finite; the step was not"):
            run(tiny_config(train={"sync_every": every}), "1", tmp_path)


def test_a_guard_stops_after_too_many_steps_in_a_row_and_starts_over_after_a_good_one() -> None:
    guard, norm = StepGuard(TrainConfig(nonfinite="skip")), torch.tensor(1.0)
    for step in range(1, MOST_SKIPPED + 1):
        assert not guard.takes(step, "the loss is nan", norm, None)
    assert guard.takes(20, "", norm, None)
    for step in range(21, 21 + MOST_SKIPPED):
        assert not guard.takes(step, "", torch.tensor(NAN), None)
    with pytest.raises(RunAborted, match=f"step 40: the loss is nan, as in the {MOST_SKIPPED} steps before it"):
        guard.takes(40, "the loss is nan", norm, None)


def test_a_node_without_a_fault_follows_the_vote() -> None:
    guard, norm = StepGuard(TrainConfig(nonfinite="skip")), torch.tensor(1.0)
    told: list[float] = []
    assert not guard.takes(1, "", norm, lambda own: told.append(own) or 1.0)  # type: ignore[func-returns-value]
    assert guard.takes(2, "", norm, lambda own: told.append(own) or 0.0)  # type: ignore[func-returns-value]
    assert told == [0.0, 0.0]


def test_the_round_that_agrees_is_held_only_where_it_is_needed() -> None:
    def kinds(**train: Any) -> list[str]:
        return [kind for kind in schedule_of(tiny_config(train=train)).rounds(6) if kind != TAKE]

    assert kinds(sync_every=2, nonfinite="skip") == ["finite", "weights"]
    assert kinds(sync_every=2) == ["weights"]
    assert kinds(sync_every=1, nonfinite="skip") == ["gradients"]
    assert schedule_of(tiny_config(train={"sync_every": 4, "nonfinite": "skip"})).rounds(1)[0] == "finite"


def test_the_warm_start_that_ends_without_finite_moments_is_said_in_words(tmp_path: Path) -> None:
    config = tiny_config(train={"sync_every": 2})
    shared = Coordinator(config, WORLDS["1"], 6)

    def work(rank: int, wire: ThreadWire) -> None:
        session = Session(shared, rank)
        payload = payload_format(config)
        here, trainer = make_world(payload, WORLDS["1"], wire, session, tmp_path), make_trainer(config, payload)
        whole_step = trainer.step

        def step(world: World, go: Go) -> Metrics:
            if go.step == config.compress.warm_start_steps:
                with torch.no_grad():
                    trainer.model.layers[1].self_attn.k_proj.weight[0, 0] = NAN
            return whole_step(world, go)

        trainer.step = step  # type: ignore[method-assign]
        with pytest.raises(RunAborted, match="step 3: no basis: the second moment of layer 1's k is not finite"):
            trainer.run(here, session, Still())

    run_ranks(1, work)


def _spoil(name: str, value: float, tensors: dict[str, Tensor]) -> None:
    if name in tensors:
        tensors[name].view(-1)[0] = value


def checkpoint(folder: Path, step: int, **spoil: float) -> tuple[Config, ExchangedLlama, torch.optim.Optimizer]:
    """A complete checkpoint of one node; `spoil` sets an entry of a tensor after it was written."""
    config = tiny_config()
    model = small_model(config)
    optimizer = make_optimizer(model, config.train)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    Checkpoints(folder, 0, "corpus a").save(step, model, optimizer)
    mark_complete(folder, step, nodes=1)
    for name, value in spoil.items():
        for file in ("model", "node-0"):
            path = checkpoint_folder(folder, step) / f"{file}.safetensors"
            rewrite(path, partial(_spoil, name, value))
    return config, model, optimizer


@pytest.mark.parametrize("what", ["a weight", "a moment"])
def test_nothing_is_written_that_is_not_finite(what: str, tmp_path: Path) -> None:
    _, model, optimizer = checkpoint(tmp_path, 1)
    weight = model.norm.weight
    with torch.no_grad():
        (weight if what == "a weight" else optimizer.state[weight]["exp_avg"])[0] = NAN
    with pytest.raises(RunAborted, match=r"step 2: no checkpoint: (optimizer\.exp_avg\.)?norm\.weight is not finite"):
        Checkpoints(tmp_path, 0).save(2, model, optimizer)
    assert not checkpoint_folder(tmp_path, 2).exists()


@pytest.mark.parametrize("name", ["norm.weight", "optimizer.exp_avg_sq.norm.weight"])
def test_what_was_written_all_the_same_is_refused_and_a_sound_one_is_named(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    config, model, optimizer = checkpoint(tmp_path, 3, **{name: float("inf")})
    checkpoint(tmp_path, 2, **{name: NAN})
    sound = f"{name} is not finite; .*step-000001 is sound"
    with pytest.raises(
        ConfigError, match=f"step-000003/node-0.safetensors: {sound}: use it, or move .*step-000003 away"
    ):
        Checkpoints(tmp_path, 0).load(3, model, optimizer)
    if name == "norm.weight":
        with pytest.raises(ConfigError, match=f"step-000003/model.safetensors: {sound}"):
            load_model(checkpoint_folder(tmp_path, 3), drawn_model(config, VOCAB))


def test_a_checkpoint_of_another_corpus_or_step_is_refused(tmp_path: Path) -> None:
    config, model, optimizer = checkpoint(tmp_path, 1)
    folder = checkpoint_folder(tmp_path, 1)
    Checkpoints(tmp_path, 0, "corpus a").load(1, model, optimizer)
    load_model(folder, drawn_model(config, VOCAB), "corpus a")
    with pytest.raises(ConfigError, match=r"was trained on another corpus .fingerprint corpus a, here corpus b"):
        Checkpoints(tmp_path, 0, "corpus b").load(1, model, optimizer)
    with pytest.raises(ConfigError, match=r"model\.safetensors: was trained on another corpus"):
        load_model(folder, drawn_model(config, VOCAB), "corpus b")
    folder.rename(checkpoint_folder(tmp_path, 8))
    with pytest.raises(ConfigError, match="is of step 1, and its folder of step 8"):
        Checkpoints(tmp_path, 0).load(8, model, optimizer)


def test_a_disk_without_room_is_one_line(tmp_path: Path) -> None:
    _, model, optimizer = checkpoint(tmp_path, 1)
    (tmp_path / "full").write_text("")
    with pytest.raises(Exception, match=r"^.*/full/checkpoint/.*: cannot be written: ") as caught:
        Checkpoints(tmp_path / "full", 0).save(1, model, optimizer)
    assert type(caught.value).__name__ == "IsthmusError"
