"""A basis that is taken anew at sync points: when, from which moments, in which coordinates, and over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import train
from helpers.small import largest_difference, schedule_of, small_model
from helpers.worlds import WORLDS, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from coordinator.plan import TAKE
from coordinator.records.folder import checkpoint_folder
from node.config import Config
from node.subspace.basis import align, principal_directions
from node.train.basis import RunningMoments
from node.train.trainer import Trainer

WIDTH, RANK = 12, 3


def refreshing(steps: int = 10, sync_every: int = 2, refresh_every: int = 2, **compress: Any) -> Config:
    return tiny_config(
        train={"steps": steps, "sync_every": sync_every, "checkpoint_every": sync_every},
        compress={"refresh_every": refresh_every, "warmup_steps": 2} | compress,
    )


def steps_with(config: Config, kind: str) -> list[int]:
    return [step for step in range(1, config.train.steps + 1) if kind in schedule_of(config).rounds(step)]


def test_a_refresh_follows_a_sync_point_and_a_whole_interval_of_compressed_steps() -> None:
    """A step begins with it, so that what is saved and evaluated after a step is of the basis it was trained by."""
    config = refreshing(steps=20, refresh_every=4)
    assert steps_with(config, "moments") == steps_with(config, "basis") == [3, 9, 13, 17]
    assert all("weights" in schedule_of(config).rounds(step - 1) for step in steps_with(config, "basis"))
    assert [step for step in range(1, 21) if schedule_of(config).refreshes(step)] == [9, 13, 17]
    assert schedule_of(refreshing(sync_every=1)).rounds(5) == ["moments", "basis", "gradients", TAKE]  # and it is saved
    assert steps_with(refreshing(steps=12, basis="weights"), "moments") == []
    assert steps_with(refreshing(steps=12, basis="weights"), "basis") == [3, 5, 7, 9, 11]
    assert steps_with(refreshing(refresh_every=0), "basis") == [3]
    assert steps_with(refreshing(mode="dense"), "basis") == []


def test_moments_are_taken_in_few_compressed_steps() -> None:
    config = refreshing(steps=1000, sync_every=20, refresh_every=200)
    sampled = [step for step in range(1, 1001) if schedule_of(config).samples_moments(step)]
    assert sampled[:2] == [12, 24]
    assert 16 <= len([step for step in sampled if 200 < step <= 400]) <= 17
    assert not any(schedule_of(refreshing(basis="weights")).samples_moments(step) for step in range(1, 11))
    assert not any(schedule_of(refreshing(refresh_every=0)).samples_moments(step) for step in range(1, 11))
    assert [step for step in range(1, 7) if schedule_of(refreshing()).samples_moments(step)] == [3, 4, 5, 6]


def test_running_moments_are_what_was_seen_since_and_a_share_of_what_was_before() -> None:
    running = RunningMoments(0.25)
    one, two, three = (torch.full((1, 2, 2), value) for value in (1.0, 2.0, 4.0))
    running.add({(0, "k"): one})
    running.add({(0, "k"): two})
    running.add({})
    taken = running.take()
    assert torch.equal(taken[0, "k"], one + two)
    taken[0, "k"].zero_()  # the sum over nodes overwrites it
    running.add({(0, "k"): three})
    assert torch.equal(running.take()[0, "k"], 0.25 * (one + two) + three)


def subspaces(seed: int, columns: int) -> Tensor:
    rows = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(seed))
    return principal_directions(rows.mT @ rows, columns)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from([RANK, 2 * RANK]))
def test_alignment_keeps_the_subspace_and_comes_nearest_to_the_old(one: int, two: int, columns: int) -> None:
    old, new = subspaces(one, columns), subspaces(two, columns)
    found = align(new, old, RANK)
    eye = torch.eye(columns).expand(2, columns, columns)
    torch.testing.assert_close(found.mT @ found, eye, rtol=0, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(one)).double()).Q.float()
    for part in range(0, columns, RANK):  # Ū, then Ū₂, each within its own span
        mine, theirs, before = (u[..., part : part + RANK] for u in (found, new, old))
        torch.testing.assert_close(mine @ mine.mT, theirs @ theirs.mT, rtol=0, atol=1e-5)
        for other in (theirs, theirs @ turn, mine @ turn):
            assert ((mine - before).norm(dim=(-2, -1)) <= (other - before).norm(dim=(-2, -1)) + 1e-5).all()


def test_signs_and_order_of_an_unmoved_subspace_do_not_jump() -> None:
    old = subspaces(1, 2 * RANK)
    shuffled = old[..., [2, 0, 1, 5, 4, 3]] * torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    torch.testing.assert_close(align(shuffled, old, RANK), old, rtol=0, atol=1e-5)


def test_codecs_take_the_aligned_basis() -> None:
    _, codec = next(small_model(tiny_config()).codecs())
    old = codec.leading.clone()
    rows = torch.randn(1, 50, codec.shape.width, generator=torch.Generator().manual_seed(8))
    codec.set_moments(rows.mT @ rows, near=old)
    assert torch.equal(codec.leading, align(principal_directions(rows.mT @ rows, old.shape[-1]), old, codec.shape.rank))
    assert torch.equal(codec.directions[0], codec.leading[..., : codec.shape.rank])


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def bases(trainer: Trainer) -> list[Tensor]:
    return [codec.leading for _, codec in trainer.model.codecs()]


@pytest.mark.parametrize("rotation", ["geodesic", "taylor2"])
def test_with_refreshes_ranks_train_as_one_does(rotation: str, tmp_path: Path) -> None:
    """At c = 1. The moments of all ranks make up what one rank sees."""
    config = refreshing(steps=8, sync_every=1, refresh_every=2, rotation=rotation)
    one, (single,) = train(config, WORLDS["1"], tmp_path)
    many, trainers = train(config, WORLDS["3+1"], tmp_path)
    assert many.losses() == pytest.approx(one.losses(), rel=1e-5)
    # AdamW's first steps turn the last bit of a small gradient into a part of a step; measured: 1.3e-3.
    assert largest_difference(parameters(trainers[0]), parameters(single)) < 2e-3
    for mine, theirs in zip(bases(trainers[0]), bases(single), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
    said = [sorted(digests) for _, digests in many.said[0].values()]
    assert [step for step, digests in enumerate(said) if "basis" in digests] == [3, 5, 7]  # and all ranks said the same
    config = refreshing(steps=8, sync_every=1, refresh_every=0, rotation=rotation)
    frozen, (other,) = train(config, WORLDS["1"], tmp_path)
    assert frozen.losses()[:4] == one.losses()[:4]
    assert frozen.losses()[4:] != one.losses()[4:]
    assert not torch.equal(bases(other)[0], bases(single)[0])


def test_a_refreshed_basis_keeps_more_of_what_is_sent_now(tmp_path: Path) -> None:
    """Trained fast, K and V leave a basis that was taken early: `energy_kept` in the records tells."""
    kept = {}
    for every in (0, 4):
        config = refreshing(steps=30, refresh_every=every, rotation="fixed", refresh_decay=0.0)
        run, _ = train(config, WORLDS["1"], tmp_path)
        metrics = run.said[0][30][0]
        assert metrics is not None
        kept[every] = [value for key, value in metrics.items() if key.endswith("energy_kept")]
    print(kept)
    assert sum(kept[4]) > sum(kept[0])


@pytest.mark.parametrize("world", ["1", "3+1"])
@pytest.mark.parametrize("start", [4, 6])
def test_a_resumed_run_goes_on_bit_for_bit_through_refreshes(world: str, start: int, tmp_path: Path) -> None:
    """From where the next step begins with a refresh, and where moments from before the last one still count."""
    config = refreshing(steps=10, sync_every=2, refresh_every=2)
    assert steps_with(config, "basis") == [3, 5, 7, 9]
    whole, straight = train(config, WORLDS[world], tmp_path)
    rest, resumed = train(config, WORLDS[world], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    for one, other in zip(resumed, straight, strict=True):
        assert largest_difference(parameters(one), parameters(other)) == 0.0
        assert all(torch.equal(*pair) for pair in zip(bases(one), bases(other), strict=True))


def test_only_what_a_refresh_needs_is_saved(tmp_path: Path) -> None:
    train(refreshing(steps=6), WORLDS["3+1"], tmp_path)
    ranks = [load_file(checkpoint_folder(tmp_path, 4) / f"node-{rank}.safetensors") for rank in range(2)]
    names = [f"running.{layer}.{kind}" for layer in range(2) for kind in "kv"]
    for tensors in ranks:
        assert sorted(name for name in tensors if name.startswith("running")) == names
    assert not torch.equal(ranks[0][names[0]], ranks[1][names[0]])  # each its own chunks'
    assert not any("running" in name for name in load_file(checkpoint_folder(tmp_path, 4) / "model.safetensors"))
    train(refreshing(steps=6, refresh_every=0), WORLDS["1"], tmp_path / "frozen")
    frozen = load_file(checkpoint_folder(tmp_path / "frozen", 4) / "node-0.safetensors")
    assert not any("running" in name for name in frozen)
