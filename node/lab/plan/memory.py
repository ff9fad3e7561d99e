"""Memory of each node by purpose. Activations are the tensors that autograd keeps between forward and backward, of all
passes of a step, counted one by one as `node.model` is written; the allocator's slack, the workspace of kernels and the
CUDA context are not counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from coordinator.assignment import Assignment, assign
from node.config import Config
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.lab.plan.work import parameters, reading, vocabulary_size
from node.measure.devices import Device
from node.train.from_config import payload_format
from node.train.head import RUN_TOKENS

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
    """Logits, their float32 copy, the log-probabilities and the gradient, at the peak; and where a pass computes its
    gradients in the forward (`node.train.head`), what it keeps of them."""
    payloads: float
    """Received payloads that are kept, and those of one layer of each pass in flight, in both directions (in host
    memory)."""

    @property
    def device(self) -> float:
        """Bytes on the device: all but the payloads."""
        return sum(self) - self.payloads


class Room(NamedTuple):
    """The node whose device has the least memory left."""

    rank: int
    needed: Memory
    limit_bytes: float

    @property
    def fits(self) -> bool:
        return self.needed.device <= self.limit_bytes

    @property
    def overshoot(self) -> float:
        """How many times its memory the device needs, in steps of 1 %; 1 where it fits."""
        return 1.0 if self.fits else max(1.01, round(self.needed.device / self.limit_bytes, 2))


def tightest(config: Config, spec: PassSpec, payload: PayloadFormat, devices: Sequence[Device]) -> Room:
    """The node that comes nearest to the memory of its device, which is `devices[rank]`."""
    rooms = [
        Room(rank, memory(config, spec, payload, device, rank), device.memory_bytes)
        for rank, device in enumerate(devices)
    ]
    return max(rooms, key=lambda room: room.needed.device / room.limit_bytes)


def memory(config: Config, spec: PassSpec, payload: PayloadFormat, device: Device, rank: int) -> Memory:
    """Memory of one node on this device."""
    model, assignment = config.model, config.assignment()
    width = 2 if device.half_width else FLOAT32
    tokens = config.train.batch * spec.tokens
    own = tokens * len(assignment.chunks(rank))
    who = reading(assignment)
    read = int((who.remote | who.local)[:, rank].sum())
    heads = model.heads * model.head_size
    # By layer and token: two float32 residuals; the two norms' outputs as each of five products keeps them (in half
    # width), or before and after their weights (in float32); queries and the output of attention, keys and values by
    # their own heads; four of the feed-forward.
    norms = (5 if device.half_width else 4) * model.d_model * width
    attention, lse = 2 * (heads + model.d_kv) * width, model.heads * FLOAT32
    layer = 2 * model.d_model * FLOAT32 + norms + attention + lse + 4 * model.ffn_dim * width
    decoded = read * tokens * 2 * model.d_kv * width
    activations, remote = model.layers * own * layer, (model.layers - config.local_layers) * decoded
    if config.run.recompute:  # all layers keep their input and the output of attention, and one at a time all else
        activations = model.layers * own * (model.d_model * FLOAT32 + heads * width + lse) + own * layer
        remote = min(remote, decoded)
    count = parameters(config)
    vocabulary = vocabulary_size(config)
    passes = config.train.micro_batches
    logit = vocabulary * (3 * FLOAT32 + (2 * width if device.half_width else 0))
    if own > RUN_TOKENS * passes:  # of one run of tokens; kept are the gradients of hidden states and of the head
        logits = RUN_TOKENS * logit + (own * width + passes * vocabulary * FLOAT32) * model.d_model
    else:
        logits = own * logit
    layers = range(config.local_layers, model.layers)
    sizes = [payload.chunk_bytes(index, spec) for index in layers]
    both_ways = [size + payload.chunk_bytes(index, spec, "grad") for index, size in zip(layers, sizes, strict=True)]
    received, sent = int(who.remote[:, rank].sum()), int(who.remote[list(assignment.chunks(rank))].sum())
    return Memory(
        weights=FLOAT32 * count,
        gradients=FLOAT32 * count,
        adam=2 * FLOAT32 * count,
        activations=activations,
        remote=remote,
        logits=logits,
        payloads=passes * (received * sum(sizes) + sent * max(both_ways, default=0)),
    )


def shortfall(config: Config, limit_bytes: float, assignment: Assignment, rank: int) -> str:
    """Why the chunks of `rank` do not fit into a GPU with so many bytes, with the figures; "" where they fit."""
    counts = tuple(len(assignment.chunks(one)) for one in range(assignment.n_ranks))
    owners = {"nodes": assignment.n_ranks, "min_nodes": 1, "node_speeds": ()}
    zigzag = assign(assignment.n_chunks, assignment.n_ranks, "zigzag") == assignment
    owners |= {"assignment": "zigzag" if zigzag else "contiguous", "chunks_per_node": () if zigzag else counts}
    shared = msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, **owners))
    assert shared.assignment() == assignment
    device = Device("this GPU", 0.0, limit_bytes, True)
    spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
    needed = memory(shared, spec, payload_format(shared), device, rank).device
    if needed <= limit_bytes:
        return ""
    chunks = f"{counts[rank]} of {assignment.n_chunks} chunks"
    return f"{chunks} need about {needed / 1e9:.3g} GB of the GPU, which has {limit_bytes / 1e9:.3g} GB"
