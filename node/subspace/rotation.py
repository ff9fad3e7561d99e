"""How a chunk turns the shared basis Ū by its parameter θ: U = R(θ) Ū.

Each rotation prepares a few fixed directions from the basis once, and then makes U as their combination, in
O(D·r): R, a D×D matrix, is never formed. The paper's is `taylor2`; `geodesic` is ours: exactly orthonormal for
any θ, and turning towards the data's next principal directions rather than in a random plane.

Shapes: G groups, D width of a group, r rank, m parameters of a rotation; `...` is any batch of chunks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Directions = tuple[Tensor, ...]


class Rotation(Protocol):
    """Turns a basis. `parameters` is m, the numbers of θ for each group (0: nothing is sent)."""

    parameters: int
    learned: bool  # θ comes from the data through ψ; otherwise it is drawn from the seed

    def columns(self, rank: int) -> int:
        """How many principal directions `prepare` wants for a subspace of `rank`."""

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        """The fixed directions, each [G, D, r], from the leading principal directions [G, D, columns]."""

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
    """U(θ) = cos θ Ū + sin θ Ū₂, with Ū₂ the next r principal directions: A = Ū₂Ūᵀ − ŪŪ₂ᵀ, exactly exponentiated."""

    parameters = 1
    learned = True

    def columns(self, rank: int) -> int:
        return 2 * rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        return leading_GDc[..., :rank], leading_GDc[..., rank : 2 * rank]

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        basis, second = directions
        theta = theta_Gm.unsqueeze(-1)
        return theta.cos() * basis + theta.sin() * second


class Taylor2:
    """U(θ) = Ū + θ AŪ + θ²/2 A²Ū for one fixed random antisymmetric generator A (paper, section 4.2).

    A = (S − Sᵀ)/‖S − Sᵀ‖ with S Gaussian from the seed, equal on all nodes. The norm is Frobenius, the paper's letter,
    or spectral, with which θ is an angle.
    """

    parameters = 1

    def __init__(self, seed: int, norm: str, learned: bool = True) -> None:
        self._seed = seed
        self._norm = norm
        self.learned = learned

    def columns(self, rank: int) -> int:
        return rank

    def prepare(self, leading_GDc: Tensor, rank: int) -> Directions:
        basis = leading_GDc[..., :rank]
        generator = self._generator(basis.shape[-2]).to(basis.device)
        once = generator @ basis.double()
        return basis, once.float(), (generator @ once).float()

    def turn(self, directions: Directions, theta_Gm: Tensor) -> Tensor:
        basis, once, twice = directions
        theta = theta_Gm.unsqueeze(-1)
        return basis + theta * once + 0.5 * theta.square() * twice

    def _generator(self, width: int) -> Tensor:
        source = torch.Generator().manual_seed(self._seed)
        gaussian = torch.randn(width, width, generator=source, dtype=torch.float64)
        skew = gaussian - gaussian.mT
        norm: Tensor = torch.linalg.matrix_norm(skew, ord="fro" if self._norm == "frobenius" else 2)
        return skew / norm


def make_rotation(name: str, seed: int, norm: str) -> Rotation:
    """The rotation that a config names (`compress.rotation`)."""
    if name == "fixed":
        return Fixed()
    if name == "geodesic":
        return Geodesic()
    return Taylor2(seed, norm, learned=name == "taylor2")
