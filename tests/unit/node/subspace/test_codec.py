"""Encode and decode: exact inside the subspace, the paper's backward, and θ as it should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.subspace.basis import principal_directions
from node.subspace.codec import Codec, CodecShape
from node.subspace.rotation import make_rotation

WIDTH, RANK, CHUNKS, BATCH, TOKENS = 12, 3, 2, 2, 5
CLIP = 0.5
OWN = (1, 3)
KEY = (0, "k")
ROTATIONS = ["geodesic", "taylor2", "exact", "fixed", "random"]


def make_codec(rotation: str, groups: int = 1, psi_std: float = 0.05, generators: int = 1) -> Codec:
    source = torch.Generator().manual_seed(groups)
    turns = make_rotation(rotation, 5, "spectral", generators)
    codec = Codec({KEY: CodecShape(groups, WIDTH, RANK, turns.parameters)}, KEY, turns, CLIP, seed=5)
    rows = torch.randn(groups, 40, WIDTH, generator=source)
    codec.set_moments(rows.mT @ rows)
    if codec.psi is not None:
        torch.nn.init.normal_(codec.psi, std=psi_std, generator=source)
    return codec


def activations(groups: int = 1) -> Tensor:
    return torch.randn(CHUNKS, BATCH, TOKENS, groups * WIDTH, generator=torch.Generator().manual_seed(9))


def decode_all(codec: Codec, payload: tuple[Tensor, ...]) -> Tensor:
    parts = [codec.decode(tuple(tensor[place] for tensor in payload), torch.float32) for place in range(CHUNKS)]
    return torch.stack(parts)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_payloads_have_the_shapes_that_the_format_says(rotation: str, groups: int) -> None:
    codec = make_codec(rotation, groups)
    payload = codec.encode(activations(groups), OWN)
    assert [tuple(t.shape[1:]) for t in payload] == list(codec.shape.payload_shapes(BATCH, TOKENS))
    assert len(payload) == (1 if rotation == "fixed" else 2)
    assert decode_all(codec, payload).shape == activations(groups).shape


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rotation", ["geodesic", "fixed"])
def test_what_lies_in_the_subspace_comes_back_exactly(rotation: str, groups: int) -> None:
    """The paper's reason why nothing is lost: Z U Uᵀ = Z once W is in effect B U Uᵀ. θ = 0, so U = Ū."""
    codec = make_codec(rotation, groups, psi_std=0.0)
    basis_GDr = codec.leading[..., :RANK]
    inside = torch.einsum("cbngr,gdr->cbngd", torch.randn(CHUNKS, BATCH, TOKENS, groups, RANK), basis_GDr).flatten(-2)
    found, outside = decode_all(codec, codec.encode(inside, OWN)), activations(groups)
    torch.testing.assert_close(found, inside, rtol=0, atol=1e-5)
    assert float((decode_all(codec, codec.encode(outside, OWN)) - outside).detach().abs().max()) > 0.1


def test_theta_is_a_linear_head_of_the_chunk_mean_and_clipped() -> None:
    codec = make_codec("geodesic", groups=2)
    z = activations(groups=2)
    _, theta = codec.encode(z, OWN)
    assert codec.psi is not None
    wanted = torch.einsum("cbgd,gmd->cbgm", z.mean(2).unflatten(-1, (2, WIDTH)), codec.psi).flatten(-2)
    torch.testing.assert_close(theta, wanted)
    assert 0 < float(theta.detach().abs().max()) < CLIP
    _, theta = codec.encode(100 * z, OWN)
    assert torch.equal(theta.detach().abs(), torch.full_like(theta, CLIP))


def test_theta_may_be_of_the_first_token_alone() -> None:
    codec = make_codec("geodesic", groups=2)
    first = Codec({KEY: codec.shape}, KEY, codec._rotation, CLIP, seed=5, source="first")
    assert codec.psi is not None
    first.psi = codec.psi
    z = activations(groups=2)
    wanted = torch.einsum("cbgd,gmd->cbgm", z[:, :, 0].unflatten(-1, (2, WIDTH)), codec.psi).flatten(-2)
    found = first.theta(first.grouped(z), OWN)
    torch.testing.assert_close(found, wanted.clamp(-CLIP, CLIP))
    z[:, :, 1:] += 1.0
    assert torch.equal(first.theta(first.grouped(z), OWN), found)


def test_a_rank_may_be_chosen_later() -> None:
    codec = make_codec("geodesic")
    leading, psi = codec.leading, codec.psi
    codec._shapes = {KEY: codec.shape._replace(rank=2)}
    codec.fit()
    assert codec.leading.shape == (1, WIDTH, 4)
    codec.set_basis(leading[..., :4])
    compressed, theta = codec.encode(activations(), OWN)
    assert [tuple(t.shape[1:]) for t in (compressed, theta)] == list(codec.shape.payload_shapes(BATCH, TOKENS))
    assert compressed.shape[-1] == 2
    assert codec.psi is psi


def test_without_training_theta_is_zero() -> None:
    """ψ starts at zero: U = Ū."""
    turns = make_rotation("geodesic", 5, "spectral")
    codec = Codec({KEY: CodecShape(1, WIDTH, RANK, 1)}, KEY, turns, CLIP, seed=5)
    codec.set_basis(torch.eye(WIDTH)[None, :, : 2 * RANK])
    _, theta = codec.encode(activations(), OWN)
    assert torch.count_nonzero(theta) == 0


def test_random_theta_is_of_seed_and_chunk_alone() -> None:
    """The same on every node and in every step, whatever the data and whoever owns what."""
    one, other = make_codec("random", 2), make_codec("random", 2)
    _, theta = one.encode(activations(2), (1, 3))
    _, swapped = other.encode(100 * activations(2).flip(0), (3, 0))
    assert torch.equal(theta[1], swapped[0])
    assert not torch.equal(theta[0], theta[1])
    assert torch.equal(theta[0, 0], theta[0, 1])  # one a chunk, for all contexts of the batch
    draws = torch.cat([other.encode(activations(2), (chunk, chunk + 1))[1].flatten() for chunk in range(0, 100, 2)])
    assert float(draws.abs().max()) <= CLIP
    assert float(draws.min()) < -0.4 < 0.4 < float(draws.max())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("rotation", "generators"), [*((name, 1) for name in ROTATIONS), ("geodesic", 3), ("taylor2", 2), ("random", 2)]
)
def test_the_compressed_backward_is_that_of_the_projection(rotation: str, generators: int, groups: int) -> None:
    """∂L/∂Zcomp = (∂L/∂Z̃) U, and with θ's gradient, all of autograd through Z U(θ) U(θ)ᵀ written out in float64."""
    codec = make_codec(rotation, groups, generators=generators)
    z, upstream = activations(groups).requires_grad_(), torch.randn(CHUNKS, BATCH, TOKENS, groups * WIDTH)

    # As on the wire: the reader's part ends at the payload, whose gradients the owner takes up.
    payload = codec.encode(z, OWN)
    arrived = tuple(tensor.detach().requires_grad_() for tensor in payload)
    returned = torch.autograd.grad(decode_all(codec, arrived), arrived, upstream, allow_unused=True)
    sent = [pair for pair in zip(payload, returned, strict=True) if pair[0].requires_grad]
    learned = [codec.psi] if codec.psi is not None else []
    found = torch.autograd.grad([tensor for tensor, _ in sent], [z, *learned], [grad for _, grad in sent])

    exact = z.detach().double().requires_grad_()
    psi = None if codec.psi is None else codec.psi.detach().double().requires_grad_()
    z_CBnGD = exact.unflatten(-1, (groups, WIDTH))
    if psi is not None:
        theta = torch.einsum("cbgd,gmd->cbgm", z_CBnGD.mean(2), psi).clamp(-CLIP, CLIP)
    elif rotation == "random":
        theta = payload[1].double().unflatten(-1, (groups, generators))
    else:
        theta = torch.zeros(CHUNKS, BATCH, groups, 0, dtype=torch.float64)
    turns = make_rotation(rotation, 5, "spectral", generators)
    u = turns.turn(tuple(part.double() for part in codec.directions), theta)
    projected = torch.einsum("cbngd,cbgdr,cbger->cbnge", z_CBnGD, u, u).flatten(-2)
    wanted = torch.autograd.grad(projected, [exact, *([psi] if psi is not None else [])], upstream.double())

    torch.testing.assert_close(decode_all(codec, payload).double(), projected, rtol=0, atol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-5  # measured: 3e-7
    compressed = torch.einsum("cbngd,cbgdr->cbngr", upstream.double().unflatten(-1, (groups, WIDTH)), u).flatten(-2)
    torch.testing.assert_close(returned[0].double(), compressed, rtol=0, atol=1e-5)


def test_theta_stays_in_float32_under_autocast() -> None:
    codec = make_codec("geodesic")
    compressed, theta = codec.encode(activations(), OWN)
    assert (compressed.dtype, theta.dtype) == (torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = codec.encode(activations(), OWN)
    assert [tensor.dtype for tensor in under_autocast] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(under_autocast[1], theta)


def test_a_basis_may_be_set_again() -> None:
    codec = make_codec("taylor2")
    before = [tensor.clone() for tensor in codec.directions]
    rows = torch.randn(1, 40, WIDTH)
    codec.set_moments(rows.mT @ rows)
    assert torch.equal(codec.leading, principal_directions(rows.mT @ rows, RANK))
    assert not torch.equal(codec.directions[0], before[0])
    codec.set_basis(codec.leading.clone())
    assert torch.equal(codec.directions[0], codec.leading)
