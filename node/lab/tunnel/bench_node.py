"""One rank's compute without a network: `python -m node.lab.tunnel.bench_node CONFIG RANK`.

`bench` starts it for each rank. It runs the trainer's own step, with a wire that discards what is sent and always has
what is asked for. It prints "ready". Then each line on standard input names a mode; it makes one step in that mode and
prints its times as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from coordinator.messages import Go
from netem.children import end_with_parent
from node.config import Config, load_config
from node.data import open_data
from node.exchange.chunks import ChunkExchange
from node.exchange.formats import Packed, TensorSpec
from node.exchange.inbox import Members
from node.exchange.passes import PassKey
from node.train.averaging import Averager
from node.train.basis import weight_moments
from node.train.checkpoint import Checkpoints
from node.train.from_config import drawn_model, payload_format
from node.train.trainer import Trainer
from node.train.world import World

SIZE = 1e-2
"""The value of all numbers that `Void` delivers."""


class StepTimes(NamedTuple):
    """One step of one rank; (forward, backward) of every layer."""

    step_s: float
    layers_s: list[tuple[float, float]]


class Void:
    """A wire without peers, on which everything has always arrived."""

    def __init__(self) -> None:
        self._made: dict[tuple[TensorSpec, ...], Packed] = {}

    def begin(self, number: int) -> None:
        pass

    def end(self, number: int) -> None:
        pass

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        pass

    def publish(self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: Packed) -> None:
        pass

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        return min(chunks)

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> Packed:
        if specs not in self._made:
            self._made[specs] = tuple(_numbers(spec) for spec in specs)
        return self._made[specs]


class Silence:
    """A ballot without rounds: no step here averages weights."""

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> object:
        raise AssertionError("a bench has no rounds")


class Stopwatch:
    """When each layer begins and ends, forward and backward, by hooks on its input and output."""

    def __init__(self, layers: nn.ModuleList) -> None:
        count = len(layers)
        self._forward = [[0.0, 0.0] for _ in range(count)]
        self._backward = [[0.0, 0.0] for _ in range(count)]
        for place, layer in enumerate(layers):
            # The first thing and the last thing that a layer does.
            first, last = layer.get_submodule("input_layernorm"), layer.get_submodule("mlp")
            first.register_forward_pre_hook(lambda _, given, place=place: self._enters(place, given[0]))
            last.register_forward_hook(lambda _, __, out, place=place: self._leaves(place, out))

    def times_s(self) -> list[tuple[float, float]]:
        """(forward, backward) of every layer in the last step."""
        pairs = zip(self._forward, self._backward, strict=True)
        return [(forward[1] - forward[0], backward[1] - backward[0]) for forward, backward in pairs]

    def _enters(self, place: int, x: Tensor) -> None:
        x.register_hook(lambda _: _note(self._backward[place], 1))
        _note(self._forward[place], 0)

    def _leaves(self, place: int, out: Tensor) -> None:
        _note(self._forward[place], 1)
        out.register_hook(lambda _: _note(self._backward[place], 0))


class Rank:
    """One rank in one mode."""

    def __init__(self, config: Config, rank: int) -> None:
        task, payload = open_data(config.data), payload_format(config)
        model = drawn_model(config, task.vocab_size, payload.ranks)
        moments = weight_moments(model)
        for key, codec in model.codecs():
            codec.set_moments(moments[key])
            codec.start()
        exchange = ChunkExchange(config.assignment(), rank, payload, Void())
        members = Members(
            0, config.assignment(), rank, tuple(f"node-{peer}" for peer in range(config.coordinator.nodes))
        )
        averager = Averager(rank, config.coordinator.nodes, None, Silence())
        self._world = World(members, exchange, averager, Checkpoints(Path(), rank))
        self._trainer = Trainer(config, task, model)
        self._watch = Stopwatch(model.layers)
        self._number = config.compress.warm_start_steps + 1  # past the warm start, and the step that takes the basis

    def step(self) -> StepTimes:
        """Make one step."""
        began = time.monotonic()
        self._trainer.step(self._world, Go(step=self._number, generation=0, cursor=0))
        return StepTimes(time.monotonic() - began, self._watch.times_s())


def mode_of(config: Config, mode: str) -> Config:
    """The config with another `compress.mode`."""
    compress = msgspec.structs.replace(config.compress, mode=mode)
    return msgspec.structs.replace(config, compress=compress)


def in_one_pass(config: Config) -> Config:
    """The config with all contexts of a step in one pass."""
    return msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, micro_batches=1))


def main(arguments: list[str]) -> int:
    """Make a step for each line of standard input, until it ends."""
    end_with_parent()
    config, rank = in_one_pass(load_config(Path(arguments[0]))), int(arguments[1])
    torch.set_num_threads(config.run.threads)
    benches = {mode: Rank(mode_of(config, mode), rank) for mode in ("subspace", "dense")}
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(benches[line.strip()].step()._asdict()), flush=True)
    return 0


def _note(times: list[float], place: int) -> None:
    times[place] = time.monotonic()


def _numbers(spec: TensorSpec) -> Tensor:
    if spec.dtype.is_floating_point:
        return torch.full(spec.shape, SIZE).to(spec.dtype)
    return torch.zeros(spec.shape, dtype=spec.dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
