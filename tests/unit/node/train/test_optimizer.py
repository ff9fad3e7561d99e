"""AdamW's groups, and the clipping of gradients."""

import pytest
import torch
from helpers.small import small_model
from helpers.worlds import tiny_config

from node.train.optimizer import clip_gradients, make_optimizer, set_learning_rate


def test_only_matrices_decay_and_every_parameter_is_trained_once() -> None:
    config = tiny_config(train={"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9})
    model = small_model(config)
    optimizer = make_optimizer(model, config.train)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in plain["params"]} == {name for name in names.values() if "norm" in name}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert any("psi" in names[p] for p in decayed["params"])
    assert decayed["betas"] == (0.8, 0.9)


def test_one_step_is_adamw_by_hand() -> None:
    """Decay, then a step of lr · m̂ / √v̂: the sign of the gradient, the first time."""
    config = tiny_config(train={"weight_decay": 0.5})
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, config.train)
    set_learning_rate(optimizer, 0.1)
    model.weight.grad, model.bias.grad = torch.full((2, 3), -4.0), torch.full((2,), 4.0)
    bias = model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5) + 0.1)
    torch.testing.assert_close(model.bias.detach(), bias - 0.1)


def test_gradients_are_scaled_to_the_bound_and_their_norm_is_returned() -> None:
    model = torch.nn.Linear(2, 1)
    for bound, kept in ((1.0, 0.2), (0.0, 1.0), (9.0, 1.0)):
        model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
        assert float(clip_gradients(model, bound)) == pytest.approx(5.0)
        assert model.weight.grad[0, 0].item() == pytest.approx(3.0 * kept, rel=1e-5)
        assert model.bias.grad.item() == pytest.approx(4.0 * kept, rel=1e-5)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    """ψ has none before compression starts."""
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(model, 1.0)) == pytest.approx(5.0)
