"""What autograd runs for the exchange: operations whose backward is the mirror of their forward.

Each holds the handle of its pass (`node.exchange.chunks.Pass`), so several passes may be in flight, and their forwards
and backwards in any order that is the same on all nodes.

Shapes: C own chunks, B batch; p numbers of θ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from node.exchange.chunks import Pass


class Publish(Function):
    """Send the own chunks' payload; in the backward, add up what their readers return."""

    @staticmethod
    def forward(ctx: Any, step: Pass, layer: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.step, ctx.layer = step, layer
        ctx.tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        anchor = torch.zeros((), device=tensors[0].device)
        exchange = step.exchange
        if not exchange.payload.exchanges(layer):
            return anchor, *(tensor.view_as(tensor) for tensor in tensors)
        packed = step.pack(layer, tensors)
        for place, chunk in enumerate(exchange.own):
            step.send_to_readers(layer, chunk, tuple(tensor[place] for tensor in packed))
        return anchor, *(tensor.view_as(tensor) for tensor in step.unpack(layer, packed))

    @staticmethod
    def backward(ctx: Any, _anchor: Tensor | None, *local: Tensor | None) -> tuple[Tensor | None, ...]:
        step: Pass = ctx.step
        exchange = step.exchange
        totals = [
            torch.zeros(shape, dtype=torch.float32, device=device)
            if grad is None
            else grad.to(torch.float32, copy=True)
            for (shape, _, device), grad in zip(ctx.tensors, local, strict=True)
        ]
        if shared := len(exchange.shared(ctx.layer)):
            own = step.own_gradients(ctx.layer, tuple(total[:shared] for total in totals))
            for total, parts in zip(totals, own, strict=True):
                total[:shared] = parts
        for place, chunk in enumerate(exchange.own):
            for rank in step.remote_readers(ctx.layer, chunk):
                returned = step.take("grad", ctx.layer, chunk, rank, totals[0].device)
                for total, part in zip(totals, returned, strict=True):
                    total[place] += part
        step.finish_backward(ctx.layer, "grad")
        grads = [total.to(dtype) for total, (_, dtype, _) in zip(totals, ctx.tensors, strict=True)]
        return None, None, *grads


class HandOn(Function):
    """Give θ of each own chunk to the owner of the next chunk; in the backward, its gradient back."""

    @staticmethod
    def forward(ctx: Any, step: Pass, layer: int, made_CBp: Tensor) -> Tensor:
        ctx.step, ctx.layer = step, layer
        exchange = step.exchange
        own = exchange.own
        for place, chunk in enumerate(own):
            if chunk + 1 < exchange.payload.chunks and chunk + 1 not in own:
                step.send(exchange.owner(chunk + 1), "theta", layer, chunk, (made_CBp[place],))
        handed = torch.zeros_like(made_CBp)
        for place, chunk in enumerate(own):
            if chunk - 1 in own:
                handed[place] = made_CBp[own.index(chunk - 1)]
            elif chunk > 0:
                rank = exchange.owner(chunk - 1)
                handed[place] = step.take_theta("theta", layer, chunk - 1, rank, made_CBp.device)
        return handed

    @staticmethod
    def backward(ctx: Any, grad_CBp: Tensor) -> tuple[Tensor | None, ...]:
        step: Pass = ctx.step
        exchange = step.exchange
        own = exchange.own
        for place, chunk in enumerate(own):
            if chunk > 0 and chunk - 1 not in own:
                sent = grad_CBp[place].clone()  # autograd may go on with its own memory
                step.send(exchange.owner(chunk - 1), "dtheta", ctx.layer, chunk - 1, (sent,))
        made = torch.zeros_like(grad_CBp)
        for place, chunk in enumerate(own):
            if chunk + 1 in own:
                made[place] = grad_CBp[own.index(chunk + 1)]
            elif chunk + 1 < exchange.payload.chunks:
                rank = exchange.owner(chunk + 1)
                made[place] = step.take_theta("dtheta", ctx.layer, chunk, rank, grad_CBp.device)
        step.finish_backward(ctx.layer, "dtheta")
        return None, None, made


class Receive(Function):
    """Take the payload of another node's chunk; in the backward, return its gradient."""

    @staticmethod
    def forward(ctx: Any, step: Pass, layer: int, chunk: int, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.layer, ctx.chunk = step, layer, chunk
        return step.take("kv", layer, chunk, step.exchange.owner(chunk), anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step: Pass = ctx.step
        packed = step.pack_gradient(ctx.layer, ctx.chunk, grads)
        step.send(step.exchange.owner(ctx.chunk), "grad", ctx.layer, ctx.chunk, packed)
        return None, None, None, torch.zeros((), device=grads[0].device)
