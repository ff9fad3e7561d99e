"""A config's ordinary step as work: all that a prediction needs and that does not depend on the network.

Many networks can so be tried with one `Model` (`Model.step_s`, bisection).
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec
import numpy as np

from node.config import Config
from node.config.stages import stage_layers
from node.exchange.passes import PassSpec
from node.lab.plan.averaging import averaging_bytes, averaging_s, form_of
from node.lab.plan.costs import Costs
from node.lab.plan.documents import expected
from node.lab.plan.lines import Lines
from node.lab.plan.pipeline import simulate_stages
from node.lab.plan.simulate import Layer, Outcome, StepWork, simulate
from node.lab.plan.stages import Stages
from node.lab.plan.work import (
    Array,
    head_work,
    layer_parameters,
    layer_work,
    optimizer_work,
    parameters,
    pass_contexts,
    reading,
    stage_parameters,
)
from node.subspace.ranks import rank_table
from node.train.from_config import payload_format

INSIDE_WIDTH, ACROSS_WIDTH = 4, 2
"""Bytes of one number of the activations between two stages: as they are within a node, in bfloat16 between nodes."""


class Model:
    """The work of a config's ordinary step: the full context, after the warm start.

    With `parts` above 1, the nodes are dealt to so many groups. Each group has a part of the layers and all chunks, so
    that the pipeline goes on from node to node ("stages across nodes"); the config knows no such layout.
    """

    def __init__(self, config: Config, parts: int = 1) -> None:
        self.config, self.parts = config, parts
        self.column = column_of(config, parts)
        self.layout = config.coordinator.layout
        self.spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
        self.payload = payload_format(self.column)
        """What one column's nodes send to each other."""
        self.tokens = config.model.context * config.train.batch
        self.parameters = parameters(config)
        count = self.layout.stages * parts
        self.stage_layers = stage_layers(config.model.layers, count)
        self.stage_parameters = stage_parameters(config, count)
        self._grad_share = _grad_share(self.column, self.spec) if self.payload.budget_bytes else 1.0
        assignment = self.column.assignment()
        optimizers = tuple(
            optimizer_work(self.column, held.of_shard(self.layout.shards)) for held in self.stage_parameters
        )
        self.step = StepWork(
            assignment,
            self._layers(),
            *head_work(self.column, self.spec),
            optimizers[-1],
            config.train.micro_batches,
            expected(self.column, assignment, self.spec.tokens).rows_CR,
            config.coordinator.relays,
        )
        tokens_R = self.spec.tokens * np.array([len(assignment.chunks(rank)) for rank in range(assignment.n_ranks)])
        numbers_R = pass_contexts(self.column) * self.layout.shards * config.model.d_model * tokens_R.astype(float)
        width = INSIDE_WIDTH if parts == 1 else ACROSS_WIDTH
        self.stages = Stages(
            self.stage_layers, self.layout.stages, config.train.pipeline, width * numbers_R, optimizers
        )

    @property
    def flops(self) -> float:
        """FLOPs of a step, all nodes."""
        works = [self.step.head_forward, self.step.head_backward]
        works += [stage.total() for layer in self.step.layers for way in layer.work for stage in way]
        return self.layout.shards * self.step.passes * float(sum(work.flops.sum() for work in works))

    def payload_bytes(self, layer: int, kind: str = "kv") -> float:
        """Bytes of one chunk of one layer in one pass of one column, to one reader ("kv"), or of the gradient back
        ("grad")."""
        if layer < self.config.local_layers:
            return 0.0
        if self.payload.compresses(layer) and self.payload.budget_bytes:  # ranks are chosen in the run
            share = self._grad_share if kind == "grad" else 1.0
            return share * self.payload.budget_bytes / len(self.config.compressed)
        return float(self.payload.chunk_bytes(layer, self.spec, kind))

    @property
    def messages(self) -> int:
        """Messages that are simulated one by one in a step: none where nodes have one stage."""
        if len(self.stage_layers) == 1:
            return 0
        exchanging = sum(layer.payload_bytes > 0 for layer in self.step.layers)
        return 2 * self.step.passes * exchanging * int(reading(self.step.assignment).remote.sum())

    def simulate(self, costs: Costs, lines: Lines) -> Outcome:
        """One step without averaging."""
        shared = msgspec.structs.replace(costs, cores=costs.cores / self.layout.shards)
        if len(self.stage_layers) == 1:
            return simulate(self.step, shared, lines)
        return simulate_stages(self.step, self.stages, shared, lines)

    def layers_s(self, costs: Costs) -> Array:
        """[R] compute time of all layers in a step, messages left out: attention, feed-forward and codecs."""
        seconds_R = np.zeros(self.step.assignment.n_ranks)
        for layer in self.step.layers:
            for way in layer.work:
                seconds_R += sum(costs.seconds(stage.without_messages().total()) for stage in way)
        return self.step.passes * seconds_R

    def evenness(self, costs: Costs) -> float:
        """Compute time of the layers on the node that has least of it, as a share of the one that has most."""
        seconds_R = self.layers_s(costs)
        return float(seconds_R.min() / seconds_R.max())

    def averaging_s(self, lines: Lines) -> float:
        """One round: nodes with the same layers average them, all their devices at once."""
        ranks, form = self.step.assignment.n_ranks, form_of(self.config)
        found = []
        for part in range(self.parts):
            here = np.arange(part * ranks, (part + 1) * ranks)
            found.append(averaging_s(sum(self._averaged(part)), lines.among(here), form))
        return max(found)

    def averaging_bytes(self) -> float:
        """Payload bytes that a node sends in one round, all its devices; the mean over nodes."""
        ranks, form = self.step.assignment.n_ranks, form_of(self.config)
        every = [averaging_bytes(count, ranks, form) for part in range(self.parts) for count in self._averaged(part)]
        return sum(every) / self.parts

    def step_s(self, costs: Costs, lines: Lines) -> float:
        """A step with its part of a round."""
        return self.simulate(costs, lines).step_s + self.averaging_s(lines) / self.config.train.sync_every

    def _averaged(self, part: int) -> list[int]:
        """Parameters that each device of a node of this part averages with its column."""
        mine = self.stage_parameters[part * self.layout.stages : (part + 1) * self.layout.stages]
        return [held.of_shard(self.layout.shards) for held in mine for _ in range(self.layout.shards)]

    def _layers(self) -> list[Layer]:
        """One object for all layers of a kind, so that the simulation reckons their times once."""
        kinds: dict[tuple[float, float, bool], Layer] = {}
        layers, shards = [], self.layout.shards
        gathered_bytes = 4.0 * layer_parameters(self.config.model) * (shards - 1) / shards
        if len(self.stage_layers) == 1:  # passes take turns within a layer, whose weights come once for all of them
            gathered_bytes /= self.config.train.micro_batches
        for index in range(self.config.model.layers):
            sizes = self.payload_bytes(index), self.payload_bytes(index, "grad")
            kind = (*sizes, self.payload.compresses(index))
            if kind not in kinds:
                theta_bytes = self.payload.theta_bytes(index, self.spec) if sizes[0] else 0
                work = layer_work(self.column, index, self.spec, *sizes)
                payload_bytes, grad_bytes, theta_of_all = (shards * float(size) for size in (*sizes, theta_bytes))
                kinds[kind] = Layer(work, payload_bytes, grad_bytes, theta_of_all, gathered_bytes)
            layers.append(kinds[kind])
        return layers


def column_of(config: Config, parts: int = 1) -> Config:
    """The config of one column: the contexts of one shard, on the nodes that have the same layers."""
    change, train = msgspec.structs.replace, config.train
    train = change(train, batch=train.batch // config.coordinator.shards)
    owners = change(config.coordinator, shards=1)
    if parts > 1:
        owners = change(owners, nodes=owners.nodes // parts, chunks_per_node=(), node_speeds=())
    return change(config, train=train, coordinator=owners)


def _grad_share(config: Config, spec: PassSpec) -> float:
    """Bytes of a compressed gradient over those of its payload, where all ranks are as large as a budget allows."""
    table = rank_table(config.model, config.compress)
    payload = payload_format(config, table)

    def nbytes(rank: int) -> int:
        return sum(payload.codec_bytes(key, rank) for key in table.keys)

    least, greatest = payload.rank_bounds
    table.choose(
        dict.fromkeys(table.keys, max(least, bisect_right(range(1, greatest + 1), payload.budget_bytes, key=nbytes)))
    )
    sizes = {kind: sum(payload.chunk_bytes(layer, spec, kind) for layer in table.layers) for kind in ("kv", "grad")}
    return sizes["grad"] / sizes["kv"]
