"""Rotations: orthonormal where they are exact, and as near to the exponential as they claim."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from node.subspace.rotation import Fixed, Geodesic, Taylor2, make_rotation

WIDTH, RANK, GROUPS = 12, 3, 2


def leading(columns: int) -> Tensor:
    rows = torch.randn(GROUPS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(rows).Q[..., :columns]


def off_orthonormal(u: Tensor) -> float:
    return float((u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype)).abs().max())


@given(st.lists(st.floats(-1e3, 1e3), min_size=GROUPS, max_size=GROUPS))
def test_geodesic_is_orthonormal_for_any_theta(angles: list[float]) -> None:
    rotation = Geodesic()
    directions = rotation.prepare(leading(rotation.columns(RANK)), RANK)
    u = rotation.turn(directions, torch.tensor(angles, dtype=torch.float64).unsqueeze(-1))
    assert u.shape == (GROUPS, WIDTH, RANK)
    assert off_orthonormal(u) < 1e-12


def test_geodesic_is_the_exponential_of_its_generator() -> None:
    basis, second = Geodesic().prepare(leading(2 * RANK), RANK)
    generator = second @ basis.mT - basis @ second.mT
    for angle in (0.0, 0.3, -1.2):
        theta = torch.full((GROUPS, 1), angle, dtype=torch.float64)
        wanted = torch.linalg.matrix_exp(angle * generator) @ basis
        torch.testing.assert_close(Geodesic().turn((basis, second), theta), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_taylor2_differs_from_the_exponential_by_the_third_order(norm: str) -> None:
    rotation = Taylor2(seed=7, norm=norm)
    basis = leading(RANK)
    generator = rotation._generator(WIDTH)
    directions = tuple(tensor.double() for tensor in rotation.prepare(basis, RANK))

    def error(angle: float) -> float:
        theta = torch.full((GROUPS, 1), angle, dtype=torch.float64)
        exact = torch.linalg.matrix_exp(angle * generator) @ basis
        return float((rotation.turn(directions, theta) - exact).norm())

    assert error(0.0) == 0.0
    assert error(0.8) / error(0.4) == pytest.approx(8.0, rel=0.1)  # measured: 7.96 and 7.9
    bound = 0.5**3 / 6 * float(torch.linalg.matrix_norm(generator, 2)) ** 3 * (GROUPS * RANK) ** 0.5
    assert 0 < error(0.5) < 1.01 * bound


@pytest.mark.parametrize(("norm", "order"), [("frobenius", "fro"), ("spectral", 2)])
def test_the_generator_is_antisymmetric_of_norm_one_and_of_the_seed(norm: str, order: str | int) -> None:
    generator = Taylor2(seed=7, norm=norm)._generator(WIDTH)
    assert torch.equal(generator, -generator.mT)
    assert float(torch.linalg.matrix_norm(generator, order)) == pytest.approx(1.0)
    assert torch.equal(generator, Taylor2(seed=7, norm=norm)._generator(WIDTH))
    assert not torch.equal(generator, Taylor2(seed=8, norm=norm)._generator(WIDTH))


def test_fixed_is_the_basis_for_every_chunk() -> None:
    rotation = Fixed()
    directions = rotation.prepare(leading(RANK), RANK)
    u = rotation.turn(directions, torch.zeros(4, 5, GROUPS, 0))
    assert u.shape == (4, 5, GROUPS, WIDTH, RANK)
    assert torch.equal(u, leading(RANK).expand_as(u))


@pytest.mark.parametrize("name", ["geodesic", "taylor2", "random"])
def test_theta_of_any_batch_turns_one_basis_each(name: str) -> None:
    rotation = make_rotation(name, 3, "spectral")
    directions = rotation.prepare(leading(rotation.columns(RANK)), RANK)
    theta = torch.rand(4, 5, GROUPS, 1, dtype=torch.float64)
    together = rotation.turn(directions, theta)
    assert together.shape == (4, 5, GROUPS, WIDTH, RANK)
    torch.testing.assert_close(together[2, 3], rotation.turn(directions, theta[2, 3]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "parameters", "learned", "columns"),
    [("geodesic", 1, True, 6), ("taylor2", 1, True, 3), ("random", 1, False, 3), ("fixed", 0, False, 3)],
)
def test_what_each_rotation_asks_for(name: str, parameters: int, learned: bool, columns: int) -> None:
    rotation = make_rotation(name, 0, "frobenius")
    assert (rotation.parameters, rotation.learned, rotation.columns(RANK)) == (parameters, learned, columns)
