"""Memory of each device by purpose.

Activations are the tensors that autograd keeps between forward and backward, of all passes in flight, counted one by
one as `node.model` is written. The allocator's slack, the workspace of kernels and the CUDA context are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from coordinator.assignment import Assignment, assign
from node.config import Config
from node.lab.plan.model import Model
from node.lab.plan.stages import in_flight
from node.lab.plan.work import layer_parameters, pass_contexts, reading, vocabulary_size
from node.measure.devices import Device
from node.train.head import RUN_TOKENS

FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes of one device."""

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
    gathered: float
    """Where weights are sharded: whole weights outside the layers, those of two layers (one is fetched while the other
    computes), and the gradient of one."""
    boundaries: float
    """Activations and gradients from other stages: a buffer for each pass, as torch.distributed.pipelining has them."""
    payloads: float
    """Received payloads that are kept, and those of one layer of each pass in flight, in both directions (in host
    memory)."""

    @property
    def device(self) -> float:
        """Bytes on the device: all but the payloads."""
        return sum(self) - self.payloads


class Room(NamedTuple):
    """The device that has the least memory left."""

    rank: int
    """Its node."""
    stage: int
    needed: Memory
    limit_bytes: float

    @property
    def fits(self) -> bool:
        return self.needed.device <= self.limit_bytes

    @property
    def overshoot(self) -> float:
        """How many times its memory the device needs, in steps of 1 %; 1 where it fits."""
        return 1.0 if self.fits else max(1.01, round(self.needed.device / self.limit_bytes, 2))


def tightest(model: Model, devices: Sequence[Device]) -> Room:
    """The device that is nearest to its memory; those of node `rank` are `devices[rank]`."""
    ranks = model.step.assignment.n_ranks
    rooms = [
        Room(rank, stage, memory(model, on, rank, stage), on.memory_bytes)
        for rank, on in enumerate(devices[:ranks])
        for stage in range(len(model.stage_layers))
    ]
    return max(rooms, key=lambda room: room.needed.device / room.limit_bytes)


def memory(model: Model, device: Device, rank: int, stage: int = 0) -> Memory:
    """Memory of one device of a node: that of a shard of a stage."""
    config, assignment, stages = model.column, model.step.assignment, len(model.stage_layers)
    layers, shape = model.stage_layers[stage], config.model
    width = 2 if device.half_width else FLOAT32
    passes = config.train.micro_batches
    flight = in_flight(config.train.pipeline, stage, stages, passes) if stages > 1 else passes
    tokens = flight * pass_contexts(config) * model.spec.tokens
    own = tokens * len(assignment.chunks(rank))
    at_once = own if stages == 1 else own // flight  # without stages, passes take turns layer by layer
    who = reading(assignment)
    read = int((who.remote | who.local)[:, rank].sum())
    heads = shape.heads * shape.head_size
    # By layer and token: two float32 residuals; the two norms' outputs as each of five products keeps them (in half
    # width), or before and after their weights (in float32); queries and the output of attention, keys and values by
    # their own heads; four of the feed-forward.
    norms = (5 if device.half_width else 4) * shape.d_model * width
    attention, lse = 2 * (heads + shape.d_kv) * width, shape.heads * FLOAT32
    layer = 2 * shape.d_model * FLOAT32 + norms + attention + lse + 4 * shape.ffn_dim * width
    decoded = read * tokens * 2 * shape.d_kv * width
    far = [index for index in layers if index >= config.local_layers]
    activations, remote = len(layers) * own * layer, len(far) * decoded
    if config.run.recompute:  # all layers keep their input and the output of attention, and one at a time all else
        activations = len(layers) * own * (shape.d_model * FLOAT32 + heads * width + lse) + at_once * layer
        remote = min(remote, decoded * at_once // own)
    held, shards = model.stage_parameters[stage], model.layout.shards
    sizes = [model.payload.chunk_bytes(index, model.spec) for index in far]
    both_ways = [
        size + model.payload.chunk_bytes(index, model.spec, "grad") for index, size in zip(far, sizes, strict=True)
    ]
    received, sent = int(who.remote[:, rank].sum()), int(who.remote[list(assignment.chunks(rank))].sum())
    return Memory(
        weights=FLOAT32 * held.of_shard(shards),
        gradients=FLOAT32 * held.of_shard(shards),
        adam=2 * FLOAT32 * held.of_shard(shards),
        activations=activations,
        remote=remote,
        logits=_logits(config, width, own, flight) if stage == stages - 1 else 0,
        gathered=FLOAT32 * _gathered(model, stage) if shards > 1 else 0,
        boundaries=passes * (own // flight) * shape.d_model * FLOAT32 * ((stage > 0) + (stage < stages - 1)),
        payloads=flight * (received * sum(sizes) + sent * max(both_ways, default=0)),
    )


def _logits(config: Config, width: int, own: int, passes: int) -> int:
    vocabulary = vocabulary_size(config)
    logit = vocabulary * (3 * FLOAT32 + (2 * width if width < FLOAT32 else 0))
    if own > RUN_TOKENS * passes:  # of one run of tokens; kept are the gradients of hidden states and of the head
        return RUN_TOKENS * logit + (own * width + passes * vocabulary * FLOAT32) * config.model.d_model
    return own * logit


def _gathered(model: Model, stage: int) -> int:
    layer, count = layer_parameters(model.config.model), len(model.stage_layers[stage])
    return model.stage_parameters[stage].dealt - count * layer + (min(2, count) + 1) * layer


def shortfall(config: Config, limit_bytes: float, assignment: Assignment, rank: int) -> str:
    """Why the chunks of `rank` do not fit into a GPU with so many bytes, with the figures; "" where they fit."""
    counts = tuple(len(assignment.chunks(one)) for one in range(assignment.n_ranks))
    owners = {"nodes": assignment.n_ranks, "min_nodes": 1, "node_speeds": ()}
    zigzag = assign(assignment.n_chunks, assignment.n_ranks, "zigzag") == assignment
    owners |= {"assignment": "zigzag" if zigzag else "contiguous", "chunks_per_node": () if zigzag else counts}
    shared = msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, **owners))
    assert shared.assignment() == assignment
    model = Model(shared)
    needed = memory(model, Device("this GPU", 0.0, limit_bytes, True), rank).device
    if needed <= limit_bytes:
        return ""
    chunks = f"{counts[rank]} of {assignment.n_chunks} chunks"
    return f"{chunks} need about {needed / 1e9:.3g} GB of the GPU, which has {limit_bytes / 1e9:.3g} GB"
