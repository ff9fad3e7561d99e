"""A node of three dies at each message of an averaging ring, and around each vote: the others lose nothing agreed on.

The coordinator's machine, sessions, inboxes, wires and trainers are the real ones (`helpers.surviving`).
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.surviving import Point, train_with_losses
from helpers.worlds import tiny_config

from netem.errors import RunAborted
from node.config import Config
from node.train.trainer import Trainer

NODES = 3
SENDS = 2 * (NODES - 1)
"""Messages that one node sends in one round."""
VICTIMS = [f"node-{rank}" for rank in range(NODES)]


def at(what: str, number: int) -> Point:
    return lambda doing, before: doing == what and before == number


def config_for(every: int, **compress: Any) -> Config:
    train = {"steps": 4, "sync_every": every, "eval_every": 0, "lr_warmup_steps": 1}
    return tiny_config(train=train, compress=compress or {"mode": "dense"})


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@cache
def undisturbed(every: int) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        _, trainers = train_with_losses(config_for(every), Path(folder), NODES, {})
    return weights(trainers["node-0"])


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max() / one[name].abs().max()) for name in one)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("index", range(SENDS))
def test_gradients_are_averaged_by_all_who_are_left_or_by_none(index: int, victim: str, tmp_path: Path) -> None:
    """At each message of the second step's ring. The step is done again, and the weights are those of a run in which
    nobody died."""
    hub, trainers = train_with_losses(config_for(1), tmp_path, NODES, {victim: at("ring", SENDS + index)})
    assert hub.outcome == (True, "")
    assert sorted(trainers) == [name for name in VICTIMS if name != victim]
    assert [record.step for record in hub.records] == [1, 2, 3, 4], "each step counts once"
    one, two = (weights(trainer) for trainer in trainers.values())
    assert difference(one, two) == 0.0
    assert difference(one, undisturbed(1)) < 1e-3
    (fault,) = hub.faults
    assert (fault.kind, fault.nodes, fault.lost_steps) == ("lost", (victim,), 0)
    assert fault.step == (1 if hub.records[1].generation > 3 else 2)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("index", range(SENDS))
def test_weights_are_averaged_by_all_who_are_left_or_by_none(index: int, victim: str, tmp_path: Path) -> None:
    """At each message of the first averaging of weights, after two steps: they are taken, and only their averaging is
    done again."""
    config = config_for(2)
    hub, trainers = train_with_losses(config, tmp_path, NODES, {victim: at("ring", index)})
    assert hub.outcome == (True, "")
    assert [record.step for record in hub.records] == [1, 2, 3, 4]
    one, two = (trainer._agreed.vector for trainer in trainers.values())
    assert torch.equal(one, two)
    (fault,) = hub.faults
    assert (fault.kind, fault.step, fault.lost_steps) == ("lost", 2, 2)
    assert all(set(record.nodes) == set(trainers) for record in hub.records[2:])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("point", ["vote", "voted"])
@pytest.mark.parametrize("number", range(4))
def test_a_death_around_a_vote(number: int, point: str, every: int, tmp_path: Path) -> None:
    """Before it, the round has happened nowhere; after it, on all who are left."""
    hub, trainers = train_with_losses(config_for(every), tmp_path, NODES, {"node-1": at(point, number)})
    assert hub.outcome == (True, "")
    assert [record.step for record in hub.records] == [1, 2, 3, 4]
    one, two = (weights(trainer) for trainer in trainers.values())
    assert difference(one, two) == 0.0
    if every == 1:
        assert difference(one, undisturbed(1)) < 1e-3


@pytest.mark.parametrize("rotation", [{"rotation": "geodesic"}, {"rotation": "fixed", "subspace": "learned"}])
@pytest.mark.parametrize("number", range(3))
def test_a_basis_that_was_under_way_is_put_back(number: int, rotation: dict[str, str], tmp_path: Path) -> None:
    """The node dies at a round of the step that takes the basis: the others have equal bases and weights."""
    config = config_for(1, warmup_steps=1, **rotation)
    # Votes of the first step: gradients and the taking of it. Then come moments, basis and gradients.
    hub, trainers = train_with_losses(config, tmp_path, NODES, {"node-0": at("vote", 2 + number)})
    assert hub.outcome == (True, "")
    one, two = trainers.values()
    assert difference(weights(one), weights(two)) == 0.0
    for (_, mine), (_, other) in zip(one.model.codecs(), two.model.codecs(), strict=True):
        assert torch.equal(mine.leading, other.leading)
        assert float(mine.leading.abs().max()) > 0


def test_two_may_die_one_after_another_and_the_last_one_ends_alone(tmp_path: Path) -> None:
    dies = {"node-0": at("ring", SENDS + 1), "node-2": at("ring", 2 * SENDS + 1)}
    hub, trainers = train_with_losses(config_for(1), tmp_path, NODES, dies)
    assert hub.outcome == (True, "")
    assert list(trainers) == ["node-1"]
    assert difference(weights(trainers["node-1"]), undisturbed(1)) < 1e-3
    assert [fault.nodes for fault in hub.faults] == [("node-0",), ("node-2",)]


def test_where_no_try_may_be_repeated_a_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunAborted, match=r"node-1 .*was lost: it was killed; the last complete step is 1"):
        train_with_losses(config_for(1), tmp_path, NODES, {"node-1": at("ring", SENDS)}, max_retries_per_step=0)


@pytest.mark.parametrize("form", ["float32", "int4"])
@pytest.mark.parametrize("index", range(SENDS))
def test_a_fragment_that_travels_when_a_node_dies_is_applied_nowhere(index: int, form: str, tmp_path: Path) -> None:
    """Half of the weights travels under the steps. It is given up with its generation, and what it would have brought
    is sent at its next turn: the agreed weights are equal at the end."""
    fragments = {"sync_every": 4, "sync_fragments": 2, "sync_delay": 2, "sync_format": form, "outer_momentum": 0.9}
    train = {"steps": 8, "lr_warmup_steps": 1, "eval_every": 0, **fragments}
    config = tiny_config(train=train, compress={"mode": "dense"})
    hub, trainers = train_with_losses(config, tmp_path, NODES, {"node-2": at("ring", index)})
    assert hub.outcome == (True, "")
    assert [record.step for record in hub.records] == list(range(1, 9))
    one, two = (trainer._agreed for trainer in trainers.values())
    assert torch.equal(one.vector, two.vector)
    assert one.outer.velocity is not None
    assert two.outer.velocity is not None
    assert torch.equal(one.outer.velocity, two.outer.velocity)
    (fault,) = hub.faults
    assert fault.nodes == ("node-2",)
    assert fault.lost_steps == fault.step
