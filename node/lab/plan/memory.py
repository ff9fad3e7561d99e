"""Memory of the fullest node, by what it is for: what autograd keeps between forward and backward, counted tensor by
tensor as `node.model` is written; allocators' slack, kernels' workspace and the CUDA context are not counted."""

from __future__ import annotations

from typing import NamedTuple

from node.config import Config
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.lab.plan.devices import Device
from node.lab.plan.work import VOCABULARY, parameters, reading

FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes on the device of one node."""

    weights: float
    gradients: float
    adam: float
    activations: float
    """Of the layers, own chunks."""
    remote: float
    """Decoded keys and values of other chunks, which the backward of the attention needs."""
    logits: float
    """Logits, their float32 copy, the log-probabilities and the gradient, at the peak."""
    payloads: float
    """Received payloads that are kept, and what is under way of one layer, in both directions (host memory)."""

    @property
    def device(self) -> float:
        """All that is on the device."""
        return sum(self) - self.payloads


def memory(config: Config, spec: PassSpec, payload: PayloadFormat, device: Device) -> Memory:
    """The node that needs most."""
    assignment = config.assignment()
    each = [_of_rank(config, spec, payload, device, rank) for rank in range(assignment.n_ranks)]
    return max(each, key=lambda node: node.device)


def _of_rank(config: Config, spec: PassSpec, payload: PayloadFormat, device: Device, rank: int) -> Memory:
    model, assignment = config.model, config.assignment()
    width = 2 if device.half_width else FLOAT32
    tokens = config.train.batch * spec.tokens
    own = tokens * len(assignment.chunks(rank))
    who = reading(assignment)
    read = int((who.remote | who.local)[:, rank].sum())
    heads = model.heads * model.head_size
    # By layer and token: two float32 residuals; the two norms' outputs as each of five products keeps them (one copy in
    # float32, several in half width); queries, keys, values and the output of attention; four of the feed-forward.
    norms = 5 * model.d_model * width if device.half_width else 2 * model.d_model * width
    layer = 2 * model.d_model * FLOAT32 + norms + 5 * heads * width + 4 * model.ffn_dim * width
    exchanging = model.layers - config.local_layers
    count = parameters(config)
    vocabulary = VOCABULARY[config.data.tokenizer]
    logits = own * vocabulary * (3 * FLOAT32 + (2 * width if device.half_width else 0))
    sizes = [payload.chunk_bytes(index, spec) for index in range(config.local_layers, model.layers)]
    received, sent = int(who.remote[:, rank].sum()), int(who.remote[list(assignment.chunks(rank))].sum())
    return Memory(
        weights=FLOAT32 * count,
        gradients=FLOAT32 * count,
        adam=2 * FLOAT32 * count,
        activations=model.layers * own * layer,
        remote=exchanging * read * tokens * 2 * heads * width,
        logits=logits,
        payloads=received * sum(sizes) + 2 * sent * max(sizes, default=0),
    )
