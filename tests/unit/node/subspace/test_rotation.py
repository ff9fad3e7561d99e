"""Rotations: orthonormal where they are exact, and as near to the exponential as they claim."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.config.compress import EXACT_CLIP
from node.subspace.rotation import (
    Fixed,
    Geodesic,
    Rotation,
    Taylor2,
    antisymmetric,
    exponential_terms,
    make_rotation,
)

WIDTH, RANK, GROUPS = 12, 3, 2


def leading(columns: int) -> Tensor:
    rows = torch.randn(GROUPS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(rows).Q[..., :columns]


def off_orthonormal(u: Tensor) -> float:
    return float((u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype)).abs().max())


@settings(deadline=None)
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
    generator = rotation.generator(WIDTH)
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
    generator = Taylor2(seed=7, norm=norm).generator(WIDTH)
    assert torch.equal(generator, -generator.mT)
    assert float(torch.linalg.matrix_norm(generator, order)) == pytest.approx(1.0)
    assert torch.equal(generator, Taylor2(seed=7, norm=norm).generator(WIDTH))
    assert not torch.equal(generator, Taylor2(seed=8, norm=norm).generator(WIDTH))


def test_each_generator_is_another_one_and_the_first_is_that_of_a_single_one() -> None:
    rotation = Taylor2(seed=7, norm="spectral", generators=3)
    found = [rotation.generator(WIDTH, index) for index in range(3)]
    assert torch.equal(found[0], antisymmetric(WIDTH, 7, "spectral"))
    for one, other in itertools.combinations(found, 2):
        assert abs(float((one * other).sum() / one.norm() / other.norm())) < 0.5


def test_fixed_is_the_basis_for_every_chunk() -> None:
    rotation = Fixed()
    directions = rotation.prepare(leading(RANK), RANK)
    u = rotation.turn(directions, torch.zeros(4, 5, GROUPS, 0))
    assert u.shape == (4, 5, GROUPS, WIDTH, RANK)
    assert torch.equal(u, leading(RANK).expand_as(u))


ANGLES = st.floats(-0.5, 0.5)


def exponential(theta: list[float], basis: Tensor, norm: str) -> Tensor:
    """exp(Σ θ_l A_l) Ū, by torch, in float64."""
    turns = Taylor2(seed=7, norm=norm)
    total = sum(angle * turns.generator(WIDTH, index) for index, angle in enumerate(theta))
    assert isinstance(total, Tensor)
    return torch.linalg.matrix_exp(total) @ basis


def turned(rotation: Rotation, theta: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    directions = rotation.prepare(leading(rotation.columns(RANK)), RANK)
    return rotation.turn(tuple(part.to(dtype) for part in directions), torch.tensor([theta] * GROUPS, dtype=dtype))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@settings(deadline=None)
@given(angle=ANGLES)
def test_exact_is_the_exponential_to_float32s_precision_and_orthonormal(norm: str, angle: float) -> None:
    rotation = make_rotation("exact", 7, norm)
    wanted = exponential([angle], leading(RANK), norm)
    assert float((turned(rotation, [angle]) - wanted).abs().max()) < 2.0**-23  # prepared in float32
    assert float((turned(rotation, [angle], torch.float32).double() - wanted).abs().max()) < 4 * 2.0**-23
    assert off_orthonormal(turned(rotation, [angle])) < 4 * 2.0**-23


@pytest.mark.parametrize(("x", "terms"), [(0.0, 1), (0.5, 8), (0.5 * 0.5**0.5, 7), (3.0, 18)])
def test_the_series_is_as_long_as_its_bound_asks(x: float, terms: int) -> None:
    found = exponential_terms(x)
    assert found == terms
    left_out = sum(x**k / math.factorial(k) for k in range(found + 1, found + 40))
    assert left_out < 2.0**-24
    assert found == 1 or x**found / math.factorial(found) > 2.0**-24 / 4  # and no longer


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_angle_of_exact_may_be_large(norm: str) -> None:
    """Up to what a config allows (`node.config.EXACT_CLIP`)."""
    rotation = make_rotation("exact", 7, norm, clip=EXACT_CLIP)
    for angle in (EXACT_CLIP, -EXACT_CLIP, 1.0):
        wanted = exponential([angle], leading(RANK), norm)
        assert float((turned(rotation, [angle], torch.float32).double() - wanted).abs().max()) < 2e-6


def test_exact_stays_in_float32_under_autocast() -> None:
    rotation = make_rotation("exact", 7, "spectral")
    with torch.autocast("cpu", torch.bfloat16):
        found = turned(rotation, [0.4], torch.float32)
    assert torch.equal(found, turned(rotation, [0.4], torch.float32))


@settings(deadline=None)
@given(angle=st.floats(-0.02, 0.02))
def test_exact_and_taylor2_agree_at_small_theta(angle: float) -> None:
    exact, second = (make_rotation(name, 7, "spectral") for name in ("exact", "taylor2"))
    bound = abs(angle) ** 3 / 6 + 2.0**-23
    assert float((turned(exact, [angle]) - turned(second, [angle])).abs().max()) <= bound


@pytest.mark.parametrize("generators", [2, 3])
@settings(deadline=None)
@given(data=st.data())
def test_taylor2_of_several_generators_is_the_second_order_of_their_sum(generators: int, data: st.DataObject) -> None:
    theta = data.draw(st.lists(ANGLES, min_size=generators, max_size=generators))
    rotation = make_rotation("taylor2", 7, "spectral", generators)
    assert rotation.parameters == generators
    found, bound = turned(rotation, theta), sum(map(abs, theta)) ** 3 / 6
    assert float((found - exponential(theta, leading(RANK), "spectral")).norm(2, dim=(-2, -1)).max()) <= (
        1.2 * bound + 1e-6
    )
    first, *_ = generator = [Taylor2(7, "spectral").generator(WIDTH, index) for index in range(generators)]
    assert not torch.equal(first, generator[1])
    total = sum(angle * part for angle, part in zip(theta, generator, strict=True))
    assert isinstance(total, Tensor)
    written_out = (torch.eye(WIDTH, dtype=torch.float64) + total + total @ total / 2) @ leading(RANK)
    torch.testing.assert_close(found, written_out, rtol=0, atol=1e-6)


@settings(deadline=None)
@given(theta=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2))
def test_geodesic_of_several_angles_is_orthonormal_and_each_turns_its_columns(theta: list[float]) -> None:
    rotation = make_rotation("geodesic", 7, "spectral", 2)
    u = turned(rotation, theta)
    assert off_orthonormal(u) < 1e-12
    for column in range(RANK):
        single = turned(Geodesic(), [theta[column % 2]])[..., column]
        assert torch.equal(u[..., column], single)
    basis, second = leading(2 * RANK).split(RANK, -1)
    scaled = second * torch.tensor([theta[column % 2] for column in range(RANK)], dtype=torch.float64)
    wanted = torch.linalg.matrix_exp(scaled @ basis.mT - basis @ scaled.mT) @ basis
    torch.testing.assert_close(u, wanted, rtol=0, atol=1e-9)  # at 1e3 turns matrix_exp itself is off by 1e-11


@pytest.mark.parametrize(
    ("name", "m"), [("geodesic", 1), ("geodesic", 2), ("taylor2", 1), ("taylor2", 3), ("random", 2), ("exact", 1)]
)
def test_theta_of_any_batch_turns_one_basis_each(name: str, m: int) -> None:
    rotation = make_rotation(name, 3, "spectral", m)
    directions = tuple(part.double() for part in rotation.prepare(leading(rotation.columns(RANK)), RANK))
    theta = torch.rand(4, 5, GROUPS, m, dtype=torch.float64) - 0.5
    together = rotation.turn(directions, theta)
    assert together.shape == (4, 5, GROUPS, WIDTH, RANK)
    torch.testing.assert_close(together[2, 3], rotation.turn(directions, theta[2, 3]), rtol=0, atol=1e-15)
    assert torch.equal(rotation.turn(directions, torch.zeros_like(theta)), directions[0].expand_as(together))


@pytest.mark.parametrize(
    ("name", "parameters", "learned", "columns"),
    [
        ("geodesic", 1, True, 6),
        ("taylor2", 1, True, 3),
        ("exact", 1, True, 3),
        ("random", 1, False, 3),
        ("fixed", 0, False, 3),
    ],
)
def test_what_each_rotation_asks_for(name: str, parameters: int, learned: bool, columns: int) -> None:
    rotation = make_rotation(name, 0, "frobenius")
    assert (rotation.parameters, rotation.learned, rotation.columns(RANK)) == (parameters, learned, columns)
