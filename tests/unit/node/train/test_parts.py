"""Going on with another number of nodes: from the agreed weights, and with sums over nodes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import train
from helpers.worlds import WORLDS, tiny_config
from safetensors.torch import load_file

from coordinator.records.folder import checkpoint_folder
from netem.errors import ConfigError
from node.train.parts import PartKey, read_part
from node.train.tensor_files import write_tensors
from node.train.trainer import Trainer

EXACT = {"steps": 8, "sync_every": 1, "checkpoint_every": 4}


def written(folder: Path, nodes: int, *ranks: int) -> Path:
    """The parts of these ranks of a checkpoint of so many nodes: rank r has 1 + r in what is part of a sum."""
    where = checkpoint_folder(folder, 4)
    for rank in ranks:
        part = {"weight": torch.ones(3), "optimizer.exp_avg.weight": torch.full((3,), float(rank))}
        part |= {"running.0.k": torch.full((2, 2), 1.0 + rank), "outer.residual": torch.full((3,), 1.0 + rank)}
        write_tensors(part, where / f"node-{rank}.safetensors", {"nodes": str(nodes), "rank": str(rank), "step": "4"})
    return where


def test_with_as_many_nodes_each_has_its_own_part(tmp_path: Path) -> None:
    folder = written(tmp_path, 3, 0, 1, 2)
    for rank in range(3):
        tensors, own = read_part(folder, PartKey(rank, 3))
        assert own
        assert tensors["optimizer.exp_avg.weight"][0] == rank


@pytest.mark.parametrize("nodes", [1, 2, 4, 5])
def test_what_is_part_of_a_sum_is_dealt_anew_and_the_sum_stays(tmp_path: Path, nodes: int) -> None:
    folder = written(tmp_path, 3, 0, 1, 2)
    parts = [read_part(folder, PartKey(rank, nodes)) for rank in range(nodes)]
    assert not any(own for _, own in parts)
    for name in ("running.0.k", "outer.residual"):
        assert sum(tensors[name] for tensors, _ in parts).unique().tolist() == [1.0 + 2.0 + 3.0]  # type: ignore[union-attr]
    assert [int(tensors["optimizer.exp_avg.weight"][0]) for tensors, _ in parts] == [0, 1, 2, 0, 1][:nodes]


def test_a_machine_that_has_another_ranks_part_goes_on_from_that(tmp_path: Path) -> None:
    folder = written(tmp_path, 2, 1)
    tensors, own = read_part(folder, PartKey(0, 2))
    assert not own
    assert tensors["optimizer.exp_avg.weight"][0] == 1
    assert tensors["running.0.k"].unique().tolist() == [0.0]  # its owner brings it
    with pytest.raises(ConfigError, match="is missing, and so is every other node's"):
        read_part(checkpoint_folder(tmp_path, 8), PartKey(0, 2))


@pytest.mark.parametrize(("before", "after"), [("2x2", "4"), ("2x2", "1"), ("4", "3+1"), ("1", "2x2"), ("3+1", "4")])
def test_at_c_1_another_number_of_nodes_goes_on_as_if_nothing_had_happened(
    before: str, after: str, tmp_path: Path
) -> None:
    """Weights and moments are equal on all nodes, so nothing is lost; losses differ as those of worlds do."""
    config = tiny_config(train=EXACT)
    whole, _ = train(config, WORLDS[before], tmp_path)
    rest, trainers = train(config, WORLDS[after], tmp_path, start=4)
    off = max(abs(a / b - 1) for a, b in zip(rest.losses(), whole.losses()[4:], strict=True))
    print(f"{before} to {after}: losses differ by {off:.1e}")
    assert off < 1e-5
    assert len({len(trainer.optimizer.state) for trainer in trainers}) == 1


def test_a_basis_that_is_refreshed_after_the_change_is_that_of_the_undisturbed_run(tmp_path: Path) -> None:
    """The running moments of all old nodes are in the sum, also with fewer nodes."""
    compress: dict[str, Any] = {"refresh_every": 2}
    config = tiny_config(train=EXACT, compress=compress)
    whole, _ = train(config, WORLDS["4"], tmp_path)
    rest, _ = train(config, WORLDS["2x2"], tmp_path, start=4)
    assert rest.losses() == pytest.approx(whole.losses()[4:], rel=1e-5)
    # It would not be without the parts of ranks 2 and 3.
    for rank in (2, 3):
        (checkpoint_folder(tmp_path, 4) / f"node-{rank}.safetensors").unlink()
    other, _ = train(config, WORLDS["2x2"], tmp_path, start=4)
    assert other.losses() != pytest.approx(whole.losses()[4:], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"outer_momentum": 0.9, "sync_format": "int4"}, {"sync_fragments": 2}, {"sync_fragments": 2, "sync_delay": 1}],
    ids=str,
)
@pytest.mark.parametrize("after", ["1", "4"])
def test_between_averagings_all_go_on_from_the_agreed_weights(
    after: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With streaming fragments a node's own weights are others than the agreed ones."""
    config = tiny_config(train={"steps": 8, "sync_every": 2, "checkpoint_every": 4} | settings)
    whole, _ = train(config, WORLDS["2x2"], tmp_path, until=4)
    agreed = load_file(checkpoint_folder(tmp_path, 4) / "model.safetensors")
    rest, trainers = train(config, WORLDS[after], tmp_path, start=4, until=4)
    for trainer in trainers:
        own = dict(trainer.model.named_parameters())
        assert all(torch.equal(own[name], agreed[name]) for name in own)
    if "sync_fragments" not in settings:  # those say the digest of the fragment that was averaged last
        assert rest.said[0][4][1]["weights"] == whole.said[0][4][1]["weights"]
    rest, trainers = train(config, WORLDS[after], tmp_path, start=4)
    assert len(rest.losses()) == 4
    assert velocity(trainers[0]) == (settings.get("outer_momentum") is not None)


def velocity(trainer: Trainer) -> bool:
    return trainer._agreed.outer.velocity is not None


def sharded(folder: Path, columns: int, *present: int) -> Path:
    """One node's checkpoint, by as many processes: a weight of five rows, which FSDP2 deals 3 + 2, or 2 + 2 + 1 + 0."""
    where, rows = checkpoint_folder(folder, 4), -(-5 // columns)
    whole = torch.arange(10.0).view(5, 2)
    for column in present:
        mine = whole[rows * column :][:rows]
        part = {"weight": mine, "optimizer.exp_avg.weight": -mine, "outer.velocity.weight": 2 * mine}
        part |= {"optimizer.step.weight": torch.tensor(4.0), "running.0.k": torch.full((2, 2), 1.0 + column)}
        part |= {"layers.0.self_attn.codecs.k.leading": torch.ones(3)}
        about = PartKey(0, 1, column, columns)
        path = where / about.file
        write_tensors({name: t.contiguous() for name, t in part.items()}, path, about.about() | {"step": "4"})
    return where


@pytest.mark.parametrize("columns", [2, 4])
def test_shards_are_put_together_for_another_number_of_processes(tmp_path: Path, columns: int) -> None:
    folder = sharded(tmp_path, columns, *range(columns))
    whole = torch.arange(10.0).view(5, 2)
    parts = [read_part(folder, PartKey(0, 1, column, 3)) for column in range(3)]
    assert all(same for _, same in parts)
    for tensors, _ in parts:
        assert torch.equal(tensors["weight"], whole)
        assert torch.equal(tensors["optimizer.exp_avg.weight"], -whole)
        assert torch.equal(tensors["outer.velocity.weight"], 2 * whole)
        assert tensors["layers.0.self_attn.codecs.k.leading"].shape == (3,)
        assert float(tensors["optimizer.step.weight"]) == 4.0
    sums = [float(tensors["running.0.k"][0, 0]) for tensors, _ in parts]
    assert sums == [columns * (columns + 1) / 2, 0.0, 0.0]


def test_as_many_processes_have_their_own_rows(tmp_path: Path) -> None:
    folder = sharded(tmp_path, 2, 0, 1)
    tensors, same = read_part(folder, PartKey(0, 1, 1, 2))
    assert same
    assert tensors["weight"].tolist() == [[6.0, 7.0], [8.0, 9.0]]


def test_a_shard_that_is_not_here_is_missed_by_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path, 2, 0)
    with pytest.raises(
        ConfigError, match=r"node-0\.0\.safetensors: 1 of the files of this site's 2 processes are here"
    ):
        read_part(folder, PartKey(0, 1))
