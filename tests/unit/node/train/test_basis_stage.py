"""The end of the warm start: moments of all ranks, one basis on all of them to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.coordinated import Coordinator, Session, Still, corpus, make_world
from helpers.small import VOCAB, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, exchange_of, tiny_config
from torch import Tensor

from node.data import BatchSampler, Corpus
from node.subspace.basis import Moments, kept_energy, principal_directions
from node.subspace.learned import LearnedCodec
from node.train import basis
from node.train.averaging import Averager
from node.train.from_config import drawn_model, payload_format
from node.train.trainer import Trainer

CONFIG = tiny_config(compress={"calibration_batches": 3})


class Agreed:
    """A ballot on which all agree."""

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        assert ok


def moments_of(rank: int, wire: ThreadWire, world: str) -> Moments:
    sampler = BatchSampler(corpus().train, 16, CONFIG.train.batch, CONFIG.run.seed)
    exchange = exchange_of(CONFIG, WORLDS[world], rank, wire)
    return basis.activation_moments(small_model(CONFIG), exchange, sampler, cursor=10, batches=3)


def test_moments_summed_over_ranks_are_those_of_one() -> None:
    (whole,) = run_ranks(1, lambda rank, wire: moments_of(rank, wire, "1"))

    def work(rank: int, wire: ThreadWire) -> Moments:
        moments = moments_of(rank, wire, "3+1")
        basis.sum_moments(moments, Averager(rank, 2, wire, Agreed()), 5)
        return moments

    for summed in run_ranks(2, work):
        assert summed.keys() == whole.keys() == dict(small_model(CONFIG).codecs()).keys()
        for key, moment in whole.items():
            torch.testing.assert_close(summed[key], moment, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(moment, moment.mT)


def test_calibration_walks_on_from_the_cursor() -> None:
    """Three batches of two contexts: the sum of three walks of one batch."""
    sampler = BatchSampler(corpus().train, 16, 2, CONFIG.run.seed)
    exchange, model = exchange_of(CONFIG, WORLDS["1"], 0, None), small_model(CONFIG)
    parts = [basis.activation_moments(model, exchange, sampler, 10 + 2 * number, 1)[0, "k"] for number in range(3)]
    whole = basis.activation_moments(model, exchange, sampler, 10, 3)[0, "k"]
    torch.testing.assert_close(whole, parts[0] + parts[1] + parts[2])
    assert not torch.equal(parts[0], parts[1])


def test_all_ranks_take_the_basis_of_the_first_to_the_bit() -> None:
    """Whatever their own eigensolver says: here, all have other moments."""

    def work(rank: int, wire: ThreadWire) -> tuple[str, list[Tensor], list[Tensor]]:
        model = drawn_model(CONFIG, VOCAB)
        source = torch.Generator().manual_seed(rank)
        moments = {}
        for key, codec in model.codecs():
            rows = torch.randn(1, 50, codec.shape.width, generator=source)
            moments[key] = rows.mT @ rows
        basis.share_basis(model, moments, rank, Averager(rank, 4, wire, Agreed()), 6)
        wanted = [principal_directions(moments[key], codec.leading.shape[-1]) for key, codec in model.codecs()]
        return basis.basis_digest(model), [codec.directions[1] for _, codec in model.codecs()], wanted

    results = run_ranks(4, work)
    assert len({digest for digest, _, _ in results}) == 1
    for _, seconds, _ in results:
        for second, leading in zip(seconds, results[0][2], strict=True):
            assert torch.equal(second, leading[..., second.shape[-1] :])
    assert not torch.equal(results[1][2][0], results[0][2][0])


def test_a_learned_subspace_starts_at_the_basis() -> None:
    """Without the start its matrices would stay zero, and it would send nothing."""
    config = tiny_config(compress={"rotation": "fixed", "subspace": "learned"})
    model = drawn_model(config, VOCAB)
    basis.share_basis(model, dict(basis.weight_moments(model)), 0, Averager(0, 1, None, Agreed()), 6)
    for _, codec in model.codecs():
        assert isinstance(codec, LearnedCodec)
        assert float(codec.leading.norm()) > 1
        assert torch.equal(codec.down, codec.leading)
        assert torch.equal(codec.up, codec.leading)


@pytest.mark.parametrize("refresh", [True, False])
def test_a_refreshed_basis_is_aligned_to_the_one_before_it(refresh: bool) -> None:
    """The same subspace with its strengths in another order: numbers on the wire go on where they were."""
    model, averager = small_model(CONFIG), Averager(0, 1, None, Agreed())
    moments = {}
    for key, codec in model.codecs():
        columns_GDr = codec.leading[..., : codec.shape.rank]
        strengths = torch.arange(1.0, codec.shape.rank + 1)  # the weakest direction becomes the strongest
        rest = torch.eye(codec.shape.width) - columns_GDr @ columns_GDr.mT
        moments[key] = (columns_GDr * strengths) @ columns_GDr.mT + 0.01 * rest
    before = {key: codec.leading.clone() for key, codec in model.codecs()}
    basis.share_basis(model, moments, 0, averager, 6, refresh)
    for key, codec in model.codecs():
        rank = codec.shape.rank
        assert torch.allclose(codec.leading[..., :rank], before[key][..., :rank], atol=1e-4) == refresh


def test_calibration_draws_other_contexts_than_training(tmp_path: Path) -> None:
    """In a whole run: nothing that the basis was fitted to is trained on by the steps that follow it."""
    config = tiny_config(train={"sync_every": 1})
    asked: dict[int, list[int]] = {}

    class Noting(Corpus):
        def sampler(self, context: int, batch: int, seed: int) -> BatchSampler:
            made = super().sampler(context, batch, seed)
            asked.setdefault(seed, []).append(context)
            return made

    plain = corpus()
    noting = Noting(plain.train, plain.heldout, plain.tokenizer, plain.fingerprint)
    shared = Coordinator(config, WORLDS["1"], config.train.steps)
    payload, session = payload_format(config), Session(shared, 0)
    trainer = Trainer(config, noting, drawn_model(config, VOCAB, payload.ranks))
    trainer.run(make_world(payload, WORLDS["1"], None, session, tmp_path), session, Still())
    (calibration,) = asked.keys() - {config.run.seed}
    assert len(asked[calibration]) == 1
    assert len(asked[config.run.seed]) == config.train.steps


def test_energies_are_the_least_over_layers() -> None:
    model = small_model(CONFIG)
    moments = {}
    for place, (key, codec) in enumerate(model.codecs()):
        rows = torch.randn(1, 50, codec.shape.width, generator=torch.Generator().manual_seed(place)) ** 3
        moments[key] = rows.mT @ rows
    kept = basis.energies(model, moments)
    every = {key: kept_energy(moments[key], codec.leading[..., : codec.shape.rank]) for key, codec in model.codecs()}
    assert kept == {f"{kind}_energy_kept": min(every[0, kind], every[1, kind]) for kind in "kv"}
    for key, codec in model.codecs():
        codec.set_moments(moments[key])
    best = basis.energies(model, moments)
    assert all(kept[key] < best[key] < 1 for key in kept)


def test_the_digest_is_of_the_basis_alone() -> None:
    model = small_model(CONFIG)
    before = basis.basis_digest(model)
    with torch.no_grad():
        model.norm.weight.add_(1)
    assert basis.basis_digest(model) == before
    next(codec for _, codec in model.codecs()).leading.mul_(1.0001)
    assert basis.basis_digest(model) != before
