"""How a chunk turns the shared basis Ū by its parameters θ: U = R(θ) Ū.

Each rotation prepares a few fixed directions from the basis once, and then combines them to U in O(D·r); the D×D matrix
R is never formed. `Taylor2` is the paper's rotation, and `Exponential` is the one that it approximates. `Geodesic` is
ours: it is exactly orthonormal for any θ, and turns towards the data's next principal directions in place of a random
plane.

Shapes: G groups, D width of a group, r rank, m parameters of a rotation; `...` is any batch of chunks.
"""

from __future__ import annotations

import itertools
import math
from typing import Final, Protocol

import torch
from torch import Tensor

from node.config.seeds import derive

Directions = tuple[Tensor, ...]

SPECTRAL_OVER_FROBENIUS: Final = 0.5**0.5
"""Bound on ‖A‖₂ of an antisymmetric A with ‖A‖_F = 1: its singular values come in equal pairs."""


class Rotation(Protocol):
    """Turns a basis. `parameters` is m, the numbers of θ for each group (0: nothing is sent)."""

    parameters: int
    learned: bool  # θ comes from the data through ψ; otherwise it is drawn from the seed

    def columns(self, rank: int) -> int:
        """How many principal directions `prepare` wants for a subspace of `rank`."""

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        """The fixed directions, [G, ..., D, r] each, from the leading principal directions [G, D, columns]."""

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        """U [..., G, D, r] for θ [..., G, m]."""


class Fixed:
    """U = Ū for every chunk: the ablation without rotation."""

    parameters = 0
    learned = False

    def columns(self, rank: int) -> int:
        return rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        return (leading_GDc[..., :rank],)

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        (basis,) = directions
        return basis.expand(*theta_Gm.shape[:-2], *basis.shape)


class Geodesic:
    """U(θ) = cos θ Ū + sin θ Ū₂, with Ū₂ the next r principal directions: A = Ū₂Ūᵀ − ŪŪ₂ᵀ, exactly exponentiated.

    With m angles, column i turns by angle i mod m. The m generators commute (each acts on planes of its own), so
    this too is the exponential of their sum, and exactly orthonormal.
    """

    learned = True

    def __init__(self, angles: int = 1) -> None:
        self.parameters = angles

    def columns(self, rank: int) -> int:
        return 2 * rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        return leading_GDc[..., :rank], leading_GDc[..., rank : 2 * rank]

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        basis, second = directions
        rank = basis.shape[-1]
        if self.parameters == 1:
            theta = theta_Gm.unsqueeze(-1)
        else:  # [..., G, 1, r]: each column's angle
            theta = torch.cat([theta_Gm] * -(-rank // self.parameters), dim=-1)[..., :rank].unsqueeze(-2)
        return theta.cos() * basis + theta.sin() * second


class Taylor2:
    """U(θ) = (I + M + M²/2) Ū with M = Σ θ_l A_l, for fixed random antisymmetric generators A_l (paper, section 4.2).

    A = (S − Sᵀ)/‖S − Sᵀ‖ with S Gaussian from the seed, equal on all nodes. The norm is Frobenius, the paper's letter,
    or spectral, with which θ is an angle. The bound on θ holds for each generator: ‖M‖₂ ≤ m · clip · ‖A‖₂.
    """

    def __init__(self, seed: int, norm: str, learned: bool = True, generators: int = 1) -> None:
        self._seed = seed
        self._norm = norm
        self.learned = learned
        self.parameters = generators

    def columns(self, rank: int) -> int:
        return rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        """Ū, then A_l Ū for each l, A_l² Ū for each l, and (A_l A_k + A_k A_l) Ū for each pair l < k."""
        basis = leading_GDc[..., :rank]
        generators = [self.generator(basis.shape[-2], index).to(basis.device) for index in range(self.parameters)]
        once = [generator @ basis.double() for generator in generators]
        twice = [generator @ turned for generator, turned in zip(generators, once, strict=True)]
        mixed = [generators[j] @ once[k] + generators[k] @ once[j] for j, k in self._pairs()]
        return basis, *(direction.float() for direction in (*once, *twice, *mixed))

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        basis, *rest = directions
        thetas = theta_Gm.unsqueeze(-1).split(1, dim=-2)
        u = basis
        for theta, once in zip(thetas, rest, strict=False):
            u = u + theta * once
        for theta, twice in zip(thetas, rest[self.parameters :], strict=False):
            u = u + 0.5 * theta.square() * twice
        for (j, k), mixed in zip(self._pairs(), rest[2 * self.parameters :], strict=True):
            u = u + 0.5 * thetas[j] * thetas[k] * mixed
        return u

    def generator(self, width: int, index: int = 0) -> Tensor:
        """A_index, [width, width] in float64."""
        return antisymmetric(width, derive(self._seed, "generator", index) if index else self._seed, self._norm)

    def _pairs(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(range(self.parameters), 2))


class Exponential:
    """U(θ) = exp(θA) Ū for the generator of `Taylor2`, to float32's precision, for |θ| ≤ clip.

    U = Σ θᵏ (AᵏŪ / k!) over k ≤ K, with AᵏŪ / k! prepared once. What is left out is bounded by
    xᴷ⁺¹/(K+1)! · 1/(1 − x/(K+2)) with x = clip · ‖A‖₂, and K is the least that brings this below 2⁻²⁴, half of
    float32's epsilon (for clip = 0.5: 8 with the spectral norm, 7 with Frobenius'). One generator only: the exponential
    of a sum of generators that do not commute has no such short table.
    """

    parameters = 1
    learned = True

    def __init__(self, seed: int, norm: str, clip: float) -> None:
        self._generator = Taylor2(seed, norm).generator
        self.terms = exponential_terms(clip * (SPECTRAL_OVER_FROBENIUS if norm == "frobenius" else 1.0))

    def columns(self, rank: int) -> int:
        return rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        """Ū, and [G, K, D, r]: AᵏŪ / k! for k = 1 … K."""
        basis = leading_GDc[..., :rank]
        generator = self._generator(basis.shape[-2]).to(basis.device)
        series, term = [], basis.double()
        for power in range(1, self.terms + 1):
            term = generator @ term / power
            series.append(term)
        return basis, torch.stack(series, dim=1).float()

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        basis, series_GKDr = directions
        powers = [theta_Gm]
        while len(powers) < self.terms:
            powers.append(powers[-1] * theta_Gm)
        with torch.autocast(basis.device.type, enabled=False):  # this class is for full precision
            turned: Tensor = torch.einsum("...gk,gkdr->...gdr", torch.cat(powers, dim=-1), series_GKDr)
        return basis + turned


def exponential_terms(x: float) -> int:
    """The least K for which Σ_{k>K} xᵏ/k! < 2⁻²⁴, by the bound of `Exponential`; at least 1."""
    terms = 1
    while x >= terms + 2 or x ** (terms + 1) / math.factorial(terms + 1) / (1 - x / (terms + 2)) >= 2.0**-24:
        terms += 1
    return terms


def antisymmetric(width: int, seed: int, norm: str) -> Tensor:
    """(S − Sᵀ)/‖S − Sᵀ‖ in float64, S Gaussian; `norm` is "frobenius" or "spectral"."""
    source = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=source, dtype=torch.float64)
    skew = gaussian - gaussian.mT
    scale: Tensor = torch.linalg.matrix_norm(skew, ord="fro" if norm == "frobenius" else 2)
    return skew / scale


def make_rotation(name: str, seed: int, norm: str, generators: int = 1, clip: float = 0.5) -> Rotation:
    """The rotation that a config names (`compress.rotation`)."""
    assert generators == 1 or name not in ("fixed", "exact")
    if name == "fixed":
        return Fixed()
    if name == "geodesic":
        return Geodesic(generators)
    if name == "exact":
        return Exponential(seed, norm, clip)
    return Taylor2(seed, norm, learned=name == "taylor2", generators=generators)
