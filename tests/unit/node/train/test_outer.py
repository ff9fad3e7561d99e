"""The outer step at averagings: torch's Nesterov on the agreed weights, equal on all nodes, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoint_files import rewrite
from helpers.coordinated import Coordinator, Session, make_trainer, make_world, train
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.records.folder import checkpoint_folder
from netem.errors import ConfigError
from node.config import Config, TrainConfig
from node.lab.in_process import go
from node.train.averaging import flatten
from node.train.from_config import payload_format
from node.train.outer import OuterStep
from node.train.trainer import Trainer

CHANGES = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
WHOLE = slice(0, 50)


def outer_config(lr: float = 0.7, momentum: float = 0.9, **settings: int) -> Config:
    train_settings = {"steps": 8, "sync_every": 2, "checkpoint_every": 2, **settings}
    return tiny_config(train=train_settings | {"outer_lr": lr, "outer_momentum": momentum})


def weights(trainer: Trainer) -> Tensor:
    return flatten(trainer.model.parameters())


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.3, 0.0), (1.0, 0.5)])
def test_it_is_nesterov_as_torch_has_it(lr: float, momentum: float) -> None:
    outer = OuterStep(TrainConfig(outer_lr=lr, outer_momentum=momentum))
    parameter = torch.nn.Parameter(torch.zeros(50))
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=momentum > 0)
    agreed = torch.zeros(50)
    for change in CHANGES:
        agreed += outer(change, 50, WHOLE)
        parameter.grad = -change
        sgd.step()
    torch.testing.assert_close(agreed, parameter.detach(), rtol=1e-6, atol=1e-6)
    assert agreed.abs().max() > 1


def test_rate_1_without_momentum_is_plain_averaging_to_the_bit() -> None:
    outer = OuterStep(TrainConfig())
    for change in CHANGES:
        assert torch.equal(outer(change, 50, WHOLE), change)
    assert outer.velocity is None


def test_what_the_round_gave_stays_as_it_is() -> None:
    """The vector that was voted on is not ours to write to, and no later step changes what an earlier one gave."""
    outer = OuterStep(TrainConfig(outer_lr=1.0, outer_momentum=0.9))
    given = [change.clone() for change in CHANGES]
    steps = [outer(change, 50, WHOLE) for change in given]
    kept = [step.clone() for step in steps[:1]]
    outer(CHANGES[0], 50, WHOLE)
    assert all(torch.equal(*pair) for pair in zip(given, CHANGES, strict=True))
    assert torch.equal(steps[0], kept[0])


@pytest.mark.parametrize("world", ["1", "3+1", "4"])
def test_in_a_run_it_acts_at_every_averaging_and_all_ranks_agree(world: str, tmp_path: Path) -> None:
    """Against the same run by hand: the weights after the first averaging are W₀ + lr (1 + μ) Δ. `coordinated` compares
    the votes and the weights' digests of all ranks."""
    start = weights(train(outer_config(), WORLDS[world], tmp_path, until=0)[1][0])
    plain = weights(train(outer_config(1.0, 0.0), WORLDS[world], tmp_path, until=2)[1][0])
    _, trainers = train(outer_config(), WORLDS[world], tmp_path, until=2)
    torch.testing.assert_close(weights(trainers[0]), start + 0.7 * 1.9 * (plain - start), rtol=1e-5, atol=1e-6)
    _, ended = train(outer_config(), WORLDS[world], tmp_path)
    assert all(torch.equal(weights(other), weights(ended[0])) for other in ended)


@pytest.mark.parametrize("world", ["1", "3+1"])
@pytest.mark.parametrize("start", [2, 4])
def test_a_resumed_run_goes_on_bit_for_bit(world: str, start: int, tmp_path: Path) -> None:
    config = outer_config()
    whole, straight = train(config, WORLDS[world], tmp_path)
    rest, resumed = train(config, WORLDS[world], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    assert all(torch.equal(weights(one), weights(other)) for one, other in zip(resumed, straight, strict=True))


def test_a_run_resumed_with_another_momentum_would_not(tmp_path: Path) -> None:
    """The test above can fail: the momentum in the file is what makes it pass."""
    config = outer_config()
    whole, _ = train(config, WORLDS["1"], tmp_path)
    path = checkpoint_folder(tmp_path, 4) / "node-0.safetensors"
    rewrite(path, lambda tensors: tensors | {"outer.velocity": torch.zeros_like(tensors["outer.velocity"])})
    rest, _ = train(config, WORLDS["1"], tmp_path, start=4)
    assert rest.losses()[:2] == whole.losses()[4:6]  # until the next averaging
    assert rest.losses()[2] != whole.losses()[6]


@pytest.mark.parametrize(
    ("damage", "found"), [(None, "missing"), (torch.zeros(3), r"\(3,\)")], ids=["missing", "of another model"]
)
def test_a_checkpoint_without_its_momentum_is_refused(damage: Tensor | None, found: str, tmp_path: Path) -> None:
    config = outer_config()
    train(config, WORLDS["1"], tmp_path, until=2)
    path = checkpoint_folder(tmp_path, 2) / "node-0.safetensors"

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["outer.velocity"]
        tensors |= {} if damage is None else {"outer.velocity": damage}

    rewrite(path, spoil)
    with pytest.raises(ConfigError, match=rf"outer\.velocity is {found}, train\.outer_momentum wants"):
        train(config, WORLDS["1"], tmp_path, start=2)


@pytest.mark.parametrize("key", ["outer_lr", "outer_momentum"])
def test_where_gradients_are_averaged_there_is_no_outer_step(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^train\.{key} = 0\.5: expected [01]\.0, since train\.sync_every = 1 averages"
    ):
        tiny_config(train={"sync_every": 1, key: 0.5})


def test_without_momentum_a_checkpoint_holds_none(tmp_path: Path) -> None:
    train(outer_config(0.7, 0.0), WORLDS["1"], tmp_path, until=2)
    assert "outer.velocity" not in load_file(checkpoint_folder(tmp_path, 2) / "node-0.safetensors")


def test_an_aborted_round_leaves_weights_and_momentum(tmp_path: Path) -> None:
    config = outer_config()
    shared = Coordinator(config, WORLDS["1"], 8)

    def work(rank: int, wire: ThreadWire) -> None:
        payload = payload_format(config)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS["1"], wire, Session(shared, rank), tmp_path)
        for done in range(3):
            trainer.step(here, go(config, Assignment(WORLDS["1"]), done))
        agreed = trainer._agreed.vector.clone()
        assert trainer._agreed.outer.velocity is not None
        velocity = trainer._agreed.outer.velocity.clone()

        def against(*_: object) -> None:
            raise RuntimeError("aborted")

        here.averager._session = type("Session", (), {"vote": against})()
        with pytest.raises(RuntimeError, match="aborted"):
            trainer.step(here, go(config, Assignment(WORLDS["1"]), 3))
        assert torch.equal(trainer._agreed.vector, agreed)
        assert torch.equal(trainer._agreed.outer.velocity, velocity)

    run_ranks(1, work)
