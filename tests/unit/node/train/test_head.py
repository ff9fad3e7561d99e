"""The head's loss by runs of tokens: the loss and the gradients of one product and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from node.data.task import NOT_ASKED
from node.train import head
from node.train.head import head_loss

WIDTH, VOCAB = 12, 37


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=source).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=source).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=source)
    targets[::5] = NOT_ASKED
    return hidden, weight, targets


@pytest.mark.parametrize("tokens", [7, 8, 9, 16, 30])
def test_runs_of_tokens_give_the_loss_and_the_gradients_of_one_product(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "RUN_TOKENS", 8)
    hidden, weight, targets = inputs(tokens)
    wanted = F.cross_entropy(hidden @ weight.mT, targets, reduction="sum", ignore_index=NOT_ASKED)
    expected = torch.autograd.grad(wanted / 3, (hidden, weight))
    loss = head_loss(hidden, weight, targets)
    found = torch.autograd.grad(loss / 3, (hidden, weight))
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(hidden, weight, targets), wanted)


def test_no_tensor_of_tokens_times_vocabulary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "RUN_TOKENS", 8)
    hidden, weight, targets = inputs(64)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_loss(hidden, weight, targets)
    assert sorted(kept) == sorted([hidden.numel(), weight.numel()])


def test_in_bf16_the_product_is_in_bf16_and_the_loss_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = head_loss(hidden, weight, targets)
        monkeypatch.setattr(head, "RUN_TOKENS", 8)
        found = head_loss(hidden, weight, targets)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32
