"""AdamW as the paper sets it. Weight decay is on matrices only; it is what lets idle directions of K and V die out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from node.config import TrainConfig
from node.site.sharding import gradient_norm, is_sharded, own_gradients
from node.site.site import ALONE, Site


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on those of two and more dimensions."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        # A group's tensors are updated together, for which all must be sharded, or none.
        {"params": [p for p in kind if (p.dim() >= 2) == decays], "weight_decay": train.weight_decay * decays}
        for kind in ([p for p in parameters if not is_sharded(p)], [p for p in parameters if is_sharded(p)])
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]] or groups
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: nn.Module, bound: float, site: Site = ALONE) -> Tensor:
    """The global L2 norm of the gradients; scales them down to `bound` where it is exceeded (0: never)."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if site.several:
        norm = gradient_norm(model, site)
        if bound and norm > bound:
            torch._foreach_mul_(list(own_gradients(model).values()), bound / (norm + 1e-6))
        return norm
    return nn.utils.clip_grad_norm_(parameters, bound or float("inf"))
