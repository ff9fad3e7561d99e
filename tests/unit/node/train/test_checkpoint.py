"""Checkpoints: what comes back is what was saved, and a wrong or damaged file is an error of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_files import rewrite
from helpers.small import VOCAB, contexts, small_model
from helpers.worlds import WORLDS, exchange_of, full_spec, tiny_config
from safetensors.torch import load_file, save_file

from coordinator.records.folder import checkpoint_folder, checkpoints, mark_complete, step_of
from netem.errors import ConfigError
from node.config import Config
from node.model.exchanged import ExchangedLlama
from node.train.checkpoint import Checkpoints, load_model
from node.train.file_digest import read_about
from node.train.from_config import drawn_model
from node.train.optimizer import make_optimizer
from node.train.passes import loss_sum

STEP = 7


def steps(config: Config, model: ExchangedLlama, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    """Optimizer steps after the warm start; their losses."""
    exchange = exchange_of(config, WORLDS["1"], 0, None)
    losses = []
    for seed in seeds:
        loss = loss_sum(model, exchange, contexts(config, seed), full_spec(config))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(config: Config, folder: Path, rank: int = 0) -> tuple[ExchangedLlama, torch.optim.Optimizer]:
    model = small_model(config)
    optimizer = make_optimizer(model, config.train)
    steps(config, model, optimizer, range(3))
    Checkpoints(folder, rank).save(STEP, model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rotation", ["geodesic", "taylor2", "random"])
def test_the_next_steps_are_those_of_a_run_that_did_not_stop(rotation: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(compress={"rotation": rotation}, model={"tied": tied})
    model, optimizer = saved(config, tmp_path)
    other = drawn_model(config, VOCAB)
    other_optimizer = make_optimizer(other, config.train)
    Checkpoints(tmp_path, 0).load(STEP, other, other_optimizer)
    for (name, mine), theirs in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    for (_, mine), (_, theirs) in zip(other.codecs(), model.codecs(), strict=True):
        assert len(mine.directions) == len(theirs.directions) > 0
        assert all(torch.equal(*pair) for pair in zip(mine.directions, theirs.directions, strict=True))
    assert steps(config, other, other_optimizer, range(3, 6)) == steps(config, model, optimizer, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_of_the_warm_start_has_no_basis_and_no_moments_of_psi_yet(tmp_path: Path) -> None:
    config = tiny_config()
    model = drawn_model(config, VOCAB)
    optimizer = make_optimizer(model, config.train)
    exchange = exchange_of(config, WORLDS["1"], 0, None)
    loss_sum(model, exchange, contexts(config), full_spec(config)._replace(compressed=False)).backward()
    optimizer.step()
    Checkpoints(tmp_path, 0).save(STEP, model, optimizer)
    other = small_model(config)
    other_optimizer = make_optimizer(other, config.train)
    Checkpoints(tmp_path, 0).load(STEP, other, other_optimizer)
    assert all(torch.count_nonzero(codec.leading) == 0 for _, codec in other.codecs())
    assert all(codec.psi not in other_optimizer.state for _, codec in other.codecs())
    assert other_optimizer.state.keys() == {p for p in other.parameters() if p.grad is None} - {
        codec.psi for _, codec in other.codecs()
    }


def test_every_rank_writes_its_own_and_the_first_the_model(tmp_path: Path) -> None:
    config = tiny_config()
    model, _ = saved(config, tmp_path, rank=0)
    saved(config, tmp_path, rank=1)
    folder = checkpoint_folder(tmp_path, STEP)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "node-0.safetensors",
        "node-1.safetensors",
    ]
    agreed = load_file(folder / "model.safetensors")
    assert agreed.keys() == dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    assert "lm_head.weight" not in agreed  # tied: written once
    other = drawn_model(config, VOCAB)
    load_model(folder, other)
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"d_model": 48}}, r"embed_tokens\.weight is \(101, 32\), the model wants \(101, 48\)"),
        ({"model": {"layers": 4}}, "is missing, the model wants"),
        ({"model": {"layers": 2}}, r"layers\.2\..* is in it and not in the model"),
        ({"model": {"tied": False}}, r"lm_head\.weight is missing"),
        ({"compress": {"k_share": 0.9}}, "leading is"),
        ({"compress": {"scope": "head"}}, "psi is"),
        ({"compress": {"dense_last_layers": 0}}, "is missing"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused(
    sections: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    saved(tiny_config(), tmp_path)
    config = tiny_config(**sections)
    model = drawn_model(config, VOCAB)
    with pytest.raises(ConfigError, match=message) as caught:
        Checkpoints(tmp_path, 0).load(STEP, model, make_optimizer(model, config.train))
    assert "[model] or [compress]" in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        load_model(checkpoint_folder(tmp_path, STEP), model)


def test_a_compressed_model_may_be_looked_at_as_a_dense_one(tmp_path: Path) -> None:
    """`isthmus eval --compress.mode dense`: what the codecs had is left aside."""
    model, _ = saved(tiny_config(), tmp_path)
    dense = drawn_model(tiny_config(compress={"mode": "dense"}), VOCAB)
    load_model(checkpoint_folder(tmp_path, STEP), dense)
    assert torch.equal(dense.embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "a folder"])
def test_a_damaged_file_is_an_error_that_names_it(damage: str, tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    whole = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "garbage": b"\xff" * 64}[damage])
    with pytest.raises(ConfigError, match=r"node-0\.safetensors: "):
        Checkpoints(tmp_path, 0).load(STEP, model, optimizer)


def test_a_machine_without_any_part_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    (checkpoint_folder(tmp_path, STEP) / "node-0.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"node-1\.safetensors: is missing, and so is every other node's; copy one"):
        Checkpoints(tmp_path, 1).load(STEP, model, optimizer)


def test_one_flipped_bit_is_found_and_a_sound_checkpoint_is_named(tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    checkpoint_folder(tmp_path, STEP).rename(checkpoint_folder(tmp_path, STEP - 1))
    rewrite(checkpoint_folder(tmp_path, STEP - 1) / "node-0.safetensors", lambda tensors: tensors, step=str(STEP - 1))
    mark_complete(tmp_path, STEP - 1, nodes=1)
    saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    for place in (-5, 700):  # in a tensor, and in the header
        whole = path.read_bytes()
        spoiled = bytearray(whole)
        spoiled[place] ^= 1
        path.write_bytes(spoiled)
        with pytest.raises(ConfigError, match=r"node-0\.safetensors: (damaged|not a whole)"):
            Checkpoints(tmp_path, 0).load(STEP, model, optimizer)
        path.write_bytes(whole)
    Checkpoints(tmp_path, 0).load(STEP, model, optimizer)
    path.write_bytes(spoiled[:-5] + b"\0" + spoiled[-4:])
    sound = rf"{checkpoint_folder(tmp_path, STEP - 1)} is sound: use it"
    with pytest.raises(ConfigError, match=sound):
        Checkpoints(tmp_path, 0).load(STEP, model, optimizer)


def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    save_file(load_file(path), path, metadata={"step": str(STEP), "nodes": "1"})
    with pytest.raises(ConfigError, match="it holds no digest"):
        Checkpoints(tmp_path, 0).load(STEP, model, optimizer)


def test_a_snapshot_does_not_change_with_training(tmp_path: Path) -> None:
    """It is written while the next steps change weights and moments."""
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    before = read_about(path)
    snapshot = Checkpoints(tmp_path, 0).snapshot(STEP, model, optimizer)
    steps(config, model, optimizer, range(3, 5))
    snapshot.write()
    assert read_about(path) == before  # with its digest
    Checkpoints(tmp_path, 0).save(STEP, model, optimizer)
    assert read_about(path) != before


def test_older_checkpoints_make_room(tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    for step in (1, 2, 3):
        Checkpoints(tmp_path, 0).save(step, model, optimizer)
        mark_complete(tmp_path, step, nodes=1)
    Checkpoints(tmp_path, 0).snapshot(8, model, optimizer, keep_from=3).write()
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [8, STEP, 3]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    left = checkpoint_folder(tmp_path, STEP) / ".node-0.safetensors.12345"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    saved(tiny_config(), tmp_path)
    assert not left.exists()


def test_a_file_is_whole_or_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Written beside its place and renamed: a crash while writing leaves the earlier file."""
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    before = path.read_bytes()

    def half(tensors: object, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("node.train.tensor_files.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, 0).save(STEP, model, optimizer)
    assert path.read_bytes() == before


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    model, optimizer = saved(config, tmp_path)
    path = checkpoint_folder(tmp_path, STEP) / "node-0.safetensors"
    rewrite(path, lambda tensors: tensors | {"optimizer.exp_avg.norm.weight": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"optimizer\.exp_avg\.norm\.weight"):
        Checkpoints(tmp_path, 0).load(STEP, model, optimizer)
