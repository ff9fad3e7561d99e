"""Rotary embedding against its definition in complex numbers."""

import torch

from node.model.rope import Rope

HEAD_DIM, CONTEXT, THETA = 8, 64, 1000.0
ROPE = Rope(HEAD_DIM, CONTEXT, THETA, torch.device("cpu"))


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [n, H, D] as complex pairs (i, i + D/2), each turned by position · theta^(−2i/D)."""
    first, second = x.double().chunk(2, -1)
    rates = THETA ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angles = positions.double()[:, None, None] * rates
    result = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((result.real, result.imag), -1)


def test_pairs_are_turned_by_position_times_their_rate() -> None:
    x, positions = torch.randn(5, 3, HEAD_DIM), torch.tensor([0, 1, 17, 40, 63])
    error = (ROPE(x, positions).double() - turned(x, positions)).abs().max()
    assert error < 1e-5  # float32 angles up to 63; measured: 2e-6


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, HEAD_DIM)
    scores = [
        float((ROPE(q, torch.tensor([place + 7])) * ROPE(k, torch.tensor([place]))).sum()) for place in (0, 20, 50)
    ]
    assert max(scores) - min(scores) < 1e-5
    assert abs(scores[0] - float((q * k).sum())) > 1e-3


def test_every_chunk_has_positions_of_its_own() -> None:
    x = torch.randn(2, 3, 4, 1, HEAD_DIM)  # [C, B, n, H, D]
    positions = torch.tensor([[8, 9, 10, 11], [24, 25, 26, 27]])
    both = ROPE(x, positions[:, None])
    for chunk, batch in ((0, 0), (1, 2)):
        torch.testing.assert_close(both[chunk, batch], ROPE(x[chunk, batch], positions[chunk]), rtol=0, atol=0)


def test_the_dtype_is_kept() -> None:
    x = torch.randn(2, 1, HEAD_DIM, dtype=torch.bfloat16)
    assert ROPE(x, torch.arange(2)).dtype is torch.bfloat16
