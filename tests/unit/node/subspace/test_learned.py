"""A subspace that training goes on with: it starts as the frozen one, is trained like all weights, and is saved so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import train
from helpers.small import contexts, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, exchange_of, full_spec, tiny_config
from torch import Tensor

from netem.errors import ConfigError
from node.subspace.basis import MomentProbe
from node.subspace.codec import Codec, CodecShape
from node.subspace.learned import CentredCodec, LearnedCodec
from node.subspace.rotation import Fixed
from node.train import basis
from node.train.from_config import drawn_model
from node.train.passes import loss_sum
from node.train.trainer import Trainer

LEARNED: dict[str, Any] = {"rotation": "fixed", "subspace": "learned"}
BUDGET: dict[str, Any] = {"budget_bytes_per_token": 80.0}
CENTRED: dict[str, Any] = {"centred": True}
WHITENED: dict[str, Any] = CENTRED | {"whitened": True}
KEY = (0, "k")
SHAPE = CodecShape(2, 8, 3, 0)


def codecs() -> tuple[Codec, LearnedCodec]:
    """A frozen one and a learned one at its start, of the same basis."""
    rows = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(2))
    made = Codec({KEY: SHAPE}, KEY, Fixed(), 0.5, 0), LearnedCodec({KEY: SHAPE}, KEY, Fixed(), 0.5, 0)
    for codec in made:
        codec.set_moments(rows.mT @ rows)
        codec.start()
    return made


def through(codec: Codec, z_CBnK: Tensor) -> Tensor:
    (compressed,) = codec.encode(z_CBnK, (0,))
    return codec.decode((compressed[0],), torch.float32)


def matrices(trainer: Trainer) -> list[Tensor]:
    """D and U of every codec."""
    return [matrix.detach() for _, codec in trainer.model.codecs() for matrix in codec.matrices()]


def test_it_starts_as_the_frozen_one() -> None:
    frozen, learned = codecs()
    z = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(through(learned, z), through(frozen, z))
    assert learned.shape.payload_shapes(2, 5) == frozen.shape.payload_shapes(2, 5) == ((2, 5, 6),)


def test_whitened_numbers_have_a_mean_square_of_one_and_change_nothing() -> None:
    """But for what a format rounds: a weak direction's numbers are as large as a strong one's."""
    rows = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -3, 8)
    mean = torch.arange(16.0).view(2, 1, 8)
    plain = LearnedCodec({KEY: SHAPE}, KEY, Fixed(), 0.5, 0)
    whitened = CentredCodec({KEY: SHAPE}, KEY, Fixed(), 0.5, 0, whitens=True)
    z_CBnK = (rows + mean).transpose(0, 1).reshape(1, 1, 40, 16)
    probe = MomentProbe({KEY: 2}, sums=True)
    probe.see(*KEY, z_CBnK, None, ())
    mean = basis.centre(probe.moments, 40)[KEY]
    for codec in (plain, whitened):
        codec.set_moments(probe.moments[KEY])
        codec.start()
    whitened.set_centre(probe.moments[KEY], mean)
    found = mean.flatten()
    torch.testing.assert_close(found, z_CBnK.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(through(whitened, z_CBnK), through(plain, z_CBnK - found) + found)
    (compressed,) = whitened.encode(z_CBnK, (0,))
    torch.testing.assert_close(compressed.square().mean((0, 1, 2)), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_two_explicit_matrices() -> None:
    """Of z, of D and of U, after both have left the basis; what returns to the owner has the payload's shape."""
    _, codec = codecs()
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for matrix in codec.matrices():
            matrix += 0.3 * torch.randn(matrix.shape, generator=source)
    z = torch.randn(1, 2, 5, 16, generator=source, requires_grad=True)
    back = torch.randn(2, 5, 16, generator=source)
    (compressed,) = codec.encode(z, (0,))
    compressed.retain_grad()
    codec.decode((compressed[0],), torch.float32).backward(back)
    down, up = (matrix.detach().double().requires_grad_() for matrix in codec.matrices())
    plain = z.detach().double().requires_grad_()
    parts = [plain[0, ..., 8 * g : 8 * g + 8] @ down[g] @ up[g].T for g in range(2)]
    torch.cat(parts, -1).backward(back.double())
    for found, wanted in ((z, plain), (codec.down, down), (codec.up, up)):
        assert wanted.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad.float(), rtol=1e-4, atol=1e-5)
    assert compressed.grad is not None
    assert compressed.grad.shape == (1, 2, 5, 6)


def test_a_node_that_reads_nobody_has_gradients_of_zero_not_none() -> None:
    """Else the vectors that nodes add up would differ in length."""
    config = tiny_config(compress=LEARNED)

    def work(rank: int, wire: ThreadWire) -> list[Tensor | None]:
        model = small_model(config)
        exchange = exchange_of(config, WORLDS["4"], rank, wire)
        loss_sum(model, exchange, contexts(config), full_spec(config)).backward()
        return [matrix.grad for _, codec in model.codecs() for matrix in codec.matrices()]

    first, *others = run_ranks(4, work)
    assert all(gradient is not None for gradients in (first, *others) for gradient in gradients)
    assert not any(gradient.any() for gradient in first[1::2] if gradient is not None)  # U of K and of V, by layer
    assert all(gradient.any() for gradient in others[0][1::2] if gradient is not None)


@pytest.mark.parametrize("extra", [{}, BUDGET, CENTRED, BUDGET | WHITENED], ids=str)
def test_n_ranks_train_it_as_one_does(extra: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(compress=LEARNED | extra, train={"sync_every": 1})
    alone, (single,) = train(config, WORLDS["1"], tmp_path)
    shared, trainers = train(config, WORLDS["3+1"], tmp_path)
    assert shared.losses() == pytest.approx(alone.losses(), rel=1e-5)
    for trainer in trainers:
        for mine, theirs in zip(matrices(trainer), matrices(single), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    for (_, codec), down, up in zip(single.model.codecs(), matrices(single)[::2], matrices(single)[1::2], strict=True):
        assert codec.leading.any()
        for matrix in (down, up):
            assert 1e-3 < float((matrix - codec.leading).abs().max()) < 1.0, "it stayed where it was, or is elsewhere"


@pytest.mark.parametrize("extra", [{}, BUDGET, CENTRED, BUDGET | WHITENED], ids=str)
@pytest.mark.parametrize("start", [2, 4])
def test_a_resumed_run_goes_on_with_it(extra: dict[str, Any], start: int, tmp_path: Path) -> None:
    """With weights averaged every other step, and a momentum of them: what is agreed on has the matrices in it."""
    section = {"sync_every": 2, "checkpoint_every": 2, "outer_lr": 0.7, "outer_momentum": 0.9}
    config = tiny_config(compress=LEARNED | extra, train=section)
    whole, straight = train(config, WORLDS["3+1"], tmp_path)
    assert all(torch.equal(*pair) for pair in zip(*map(matrices, straight), strict=True))
    rest, resumed = train(config, WORLDS["3+1"], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    for one, other in zip(straight, resumed, strict=True):
        assert all(torch.equal(*pair) for pair in zip(matrices(one), matrices(other), strict=True))


def test_it_does_not_turn_and_is_not_taken_anew() -> None:
    with pytest.raises(
        ConfigError, match=r"compress\.rotation = 'geodesic': expected \"fixed\", since compress\.subsp"
    ):
        tiny_config(compress={"subspace": "learned"})
    with pytest.raises(ConfigError, match=r"compress\.refresh_every = 20: expected 0, since compress\.subspace"):
        tiny_config(compress=LEARNED | {"refresh_every": 20})


def test_a_frozen_model_has_no_more_weights_than_before() -> None:
    frozen = drawn_model(tiny_config(compress={"rotation": "fixed"}), 10)
    assert [name for name, _ in frozen.named_parameters() if "codecs" in name] == []
