"""Shards a model over the processes of a site with FSDP2: by layer, and what is in no layer by itself.

Each process keeps its rows of every weight; a layer's weights are gathered for its forward and its backward, and its
gradients are summed to their shards. They are sums, not means: each process's loss is its part of the whole. The
codecs' parameters, which are few, stay whole on each process, and `sum_replicated` adds up their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from node.model.exchanged import ExchangedLayer, ExchangedLlama
from node.site.site import Site


def shard(model: ExchangedLlama, site: Site, device: torch.device) -> ExchangedLlama:
    """The model on `device`, of which this process holds its shard. Every process gives the same whole model."""
    if not site.several:
        return model.to(device)
    mesh = init_device_mesh(device.type, (site.size,))
    replicated = {parameter for _, codec in model.codecs() for parameter in codec.parameters()}
    for _, codec in model.codecs():
        codec.to(device)
    units: list[tuple[nn.Module, str]] = [(layer, "together") for layer in model.layers]
    for unit, forward in [*units, (model, "whole")]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
        register_fsdp_forward_method(unit, forward)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    assert all(isinstance(layer, ExchangedLayer) for layer in model.layers)
    model.sharded = True
    return model


def forget_pass(model: ExchangedLlama) -> None:
    """A pass has ended without a backward: FSDP2 forgets what it has kept for one. A model that is not sharded keeps
    nothing."""
    if isinstance(model, FSDPModule) and model.has_run:
        model.reset_iter_state()


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; a tensor that is not sharded is its own part."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Where it is sharded, all processes of the site must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """This process's parts of all parameters by name, in the same memory."""
    return {name: own(parameter) for name, parameter in model.named_parameters()}


def own_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The same of the gradients that there are."""
    return {name: own(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def with_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """A tensor that is sharded, or not, as `parameter` is, of which this process's part is `rows`; on its device."""
    found = torch.empty_like(parameter, dtype=rows.dtype)
    own(found).copy_(rows)
    return found


def rows_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This process's rows of a tensor of `parameter`'s shape; one that is no more than these rows is returned as it is.

    FSDP2 gives every process as many rows, and the last ones fewer or none.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    rows = -(-len(tensor) // mesh.size())
    return tensor[rows * mesh.get_local_rank() :][:rows]


def whole_rows(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of tensors on the CPU, given by the names of the parameters to which they belong, of which each process
    has its rows; all processes of the site must call this together. Those of other names stay as they are."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if is_sharded(parameter)}
    return {
        name: whole(with_rows(parameters[name], rows)).cpu() if name in parameters else rows
        for name, rows in tensors.items()
    }


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process of a site holds only a part of it."""
    return isinstance(tensor, DTensor)


def sum_replicated(model: nn.Module, site: Site) -> None:
    """Add up, over the site, the gradients of the parameters that every process has whole."""
    gradients = _replicated_gradients(model)
    if not site.several or not gradients:
        return
    total = site.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    start = 0
    for gradient in gradients:
        gradient.copy_(total[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def gradient_norm(model: nn.Module, site: Site) -> Tensor:
    """The L2 norm of the whole gradient, with the same bits on all processes of the site."""
    sharded = [own(p.grad) for p in model.parameters() if p.grad is not None and is_sharded(p)]
    return (site.sum(_squares(sharded)) + _squares(_replicated_gradients(model))).sqrt()


def _replicated_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None and not is_sharded(p)]


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())
