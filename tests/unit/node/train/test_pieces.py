"""A member's state as pieces and back: what a joiner has afterwards, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers.coordinated import make_trainer, train
from helpers.worlds import WORLDS, tiny_config

from netem.errors import ConfigError, ProtocolError
from node.train.from_config import payload_format
from node.train.pieces import MOMENTS, decode_catalogue, encode_catalogue, pack, unpack
from node.train.trainer import Trainer
from node.train.transfer import PIECE_BYTES, Catalogue, Entry

SETTINGS: dict[str, dict[str, Any]] = {
    "gradients averaged": {"train": {"sync_every": 1}},
    "weights averaged": {"train": {"sync_every": 2, "outer_momentum": 0.9, "sync_format": "int4"}},
    "fragments": {"train": {"sync_every": 2, "sync_fragments": 2}},
    "refreshed": {"train": {"sync_every": 2}, "compress": {"refresh_every": 2}},
    "learned": {"train": {"sync_every": 2}, "compress": {"rotation": "fixed", "subspace": "learned"}},
    "ranks chosen": {
        "train": {"sync_every": 2},
        "compress": {"budget_bytes_per_token": 60, "format": "int4", "rotation": "fixed"},
    },
    "warm start": {"train": {"sync_every": 2}, "compress": {"warmup_steps": 5}},
}


def joined(trainer: Trainer, **sections: Any) -> Trainer:
    """A fresh trainer that has what `trainer` shares, by way of bytes."""
    config = tiny_config(**sections)
    new = make_trainer(config, payload_format(config))
    packed = trainer.share()
    catalogue = decode_catalogue(memoryview(encode_catalogue(packed.catalogue)), "node-0")
    whole = b"".join(packed.piece(index) for index in range(len(catalogue.digests)))
    new.join(unpack(catalogue, memoryview(bytearray(whole))), catalogue.step)
    return new


@pytest.mark.parametrize("name", SETTINGS)
def test_a_joiner_has_the_agreed_weights_basis_momentum_and_a_peers_moments(name: str, tmp_path: Path) -> None:
    """Also between two averagings, where a member's own weights are others."""
    sections = SETTINGS[name]
    config = tiny_config(**sections | {"train": sections["train"] | {"steps": 8}})
    _, trainers = train(config, WORLDS["2x2"], tmp_path, until=3)
    donor = trainers[1]
    new = joined(donor, **sections)
    assert new.done == 3
    shared = config.train.sync_every == 1
    agreed = dict(donor.model.named_parameters()) if shared else donor._agreed.named()
    assert all(torch.equal(tensor, agreed[key]) for key, tensor in new.model.named_parameters())
    theirs = dict(donor.model.named_buffers())
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in new.model.named_buffers())
    assert new.model.ranks.ranks == donor.model.ranks.ranks
    if not shared:
        assert torch.equal(new._agreed.vector, donor._agreed.vector)
        assert torch.equal(new._agreed.own(), new._agreed.vector)
    velocity = donor._agreed.outer.velocity
    assert (velocity is not None) == ("outer_momentum" in sections["train"])
    assert velocity is None or torch.equal(new._agreed.outer.velocity, velocity)  # type: ignore[arg-type]
    assert new._agreed.residual is None
    pairs = zip(new.model.parameters(), donor.model.parameters(), strict=True)
    for mine, other in pairs:
        moments, wanted = new.optimizer.state.get(mine, {}), donor.optimizer.state.get(other, {})
        assert moments.keys() == wanted.keys()
        assert all(torch.equal(moments[key], wanted[key]) for key in moments)
    assert new._running.total.keys() == donor._running.total.keys()
    assert all(int(torch.count_nonzero(moment)) == 0 for moment in new._running.total.values())


def test_what_all_have_agreed_on_is_in_the_same_pieces_at_every_member(tmp_path: Path) -> None:
    config = tiny_config(train={"sync_every": 2, "steps": 8}, model={"ffn_dim": 4000})
    _, trainers = train(config, WORLDS["2x2"], tmp_path, until=2)
    packed = [trainer.share() for trainer in trainers]
    one, other = (each.catalogue for each in packed)
    assert one.tensors == other.tensors
    agreed_bytes = sum(
        tensor.numel() * tensor.element_size()
        for tensor in [*trainers[0].model.parameters(), *trainers[0].model.buffers()]
    )
    alike = [a == b for a, b in zip(one.digests, other.digests, strict=True)]
    assert alike == sorted(alike, reverse=True)
    assert sum(alike) == agreed_bytes // PIECE_BYTES >= 3
    assert not alike[-1]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config(train={"sync_every": 2, "steps": 8})
    _, (trainer,) = train(config, WORLDS["1"], tmp_path, until=2)
    with pytest.raises(ConfigError, match="the model wants"):
        joined(trainer, model={"d_model": 48})


def entry(name: str = "a", dtype: str = "F32", shape: tuple[int, ...] = (2,), empty: bool = False) -> Entry:
    return Entry(name, dtype, shape, empty)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((entry(dtype="F8"),), "of type 'F8', which no state has"),
        ((entry(shape=(3,)),), "a goes beyond the 8 bytes of its state"),
        ((entry(shape=(1,)),), "the tensors of a state have 4 bytes, and it has 8"),
        ((entry(empty=True),), "a is empty, and has the shape"),
        ((entry("running.0.k", shape=(1 << 20, 1 << 20), empty=True),), "is empty, and has the shape"),
    ],
    ids=str,
)
def test_a_catalogue_that_does_not_fit_its_bytes_is_nonsense(tensors: tuple[Entry, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack(Catalogue(1, 8, tensors, (bytes(16),)), memoryview(bytearray(8)))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", msgspec.msgpack.encode([1, 2]), msgspec.msgpack.encode([1, -1, [], []])], ids=str
)
def test_bytes_that_are_no_catalogue_are_nonsense_and_name_their_sender(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="node-3: a catalogue that does not fit"):
        decode_catalogue(memoryview(data), "node-3")


def test_moments_come_last_and_a_state_of_nothing_has_no_pieces() -> None:
    tensors = {f"{MOMENTS}a": torch.ones(2), "z": torch.zeros(3), "outer.residual": torch.ones(9)}
    packed = pack(tensors, 5)
    assert [one.name for one in packed.catalogue.tensors] == ["z", f"{MOMENTS}a"]
    assert unpack(packed.catalogue, packed.data).keys() == {"z", f"{MOMENTS}a"}
    assert pack({}, 0).catalogue == Catalogue(0, 0, (), ())
