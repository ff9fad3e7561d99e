"""Memory of the fullest node by purpose. Activations are the tensors that autograd keeps between forward and backward,
counted one by one as `node.model` is written; the allocator's slack, the workspace of kernels and the CUDA context are
not counted."""

from __future__ import annotations

from typing import NamedTuple

from node.config import Config
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.lab.plan.work import VOCABULARY, parameters, reading
from node.measure.devices import Device

FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes on the device of one node."""

    weights: float
    gradients: float
    adam: float
    activations: float
    """Kept for the layers, for own chunks."""
    remote: float
    """Decoded keys and values of other chunks, kept for the backward of the attention."""
    logits: float
    """Logits, their float32 copy, the log-probabilities and the gradient, at the peak."""
    payloads: float
    """Received payloads that are kept, and those of one layer in flight, in both directions (in host memory)."""

    @property
    def device(self) -> float:
        """Bytes on the device: all but the payloads."""
        return sum(self) - self.payloads


def memory(config: Config, spec: PassSpec, payload: PayloadFormat, device: Device) -> Memory:
    """Memory of the node that needs most."""
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
