"""The numbers that a small run must share with its target, and the scales of the network that give it them.

    kind of layer    communication / compute, forward, backward, and both ways together
    latency          of the farthest pair, over what a layer computes one way (mean over layers and ways)
    averaging        one round / what is computed in the steps between two

Compute is that of the fullest node, which computes longest in a step, so that all others wait for it. Communication is
the longest time that one layer's payloads, one way, occupy any link or NIC.

Where a step has several passes, layers and payloads are those of one pass. One rate cannot make all of them equal: the
ratio of backward to forward compute differs, and where ranks are rounded, so does the ratio of bytes in compressed
layers to bytes in whole ones. `similar` makes both ways together equal, with the error spread evenly over kinds of
layers. Averaging is matched by `sync_every` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from coordinator.assignment import Assignment
from node.lab.plan.averaging import averaging_s, form_of
from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines, without_limits
from node.lab.plan.model import Model
from node.lab.plan.work import Array, Stages
from node.train.ring_formats import FLOAT32, RingFormat

COMPRESSED, WHOLE = "compressed", "whole"


class Kind(NamedTuple):
    """Layers with equal payloads, in one pass: their number, the payload of one chunk to one reader, the gradient back,
    and the compute time of the fullest node."""

    layers: int
    payload_bytes: float
    grad_bytes: float
    forward_s: float
    backward_s: float


class Body(NamedTuple):
    """A model on its devices, with only those layers that exchange."""

    assignment: Assignment
    kinds: Mapping[str, Kind]
    step_s: float
    """All compute of the fullest node in a step."""
    parameters: int
    averages_in: RingFormat = FLOAT32
    """The format of averaging rounds."""

    @property
    def layer_s(self) -> float:
        """Compute time of a layer one way; the mean over layers and both ways."""
        total_s = sum(kind.layers * (kind.forward_s + kind.backward_s) for kind in self.kinds.values())
        return total_s / (2 * sum(kind.layers for kind in self.kinds.values()))

    def slowed(self, factor: float) -> Body:
        """The body where everything takes `factor` times as long."""
        kinds = {
            name: kind._replace(forward_s=kind.forward_s * factor, backward_s=kind.backward_s * factor)
            for name, kind in self.kinds.items()
        }
        return self._replace(kinds=kinds, step_s=self.step_s * factor)


class Ratio(NamedTuple):
    """Communication over compute of one layer."""

    forward: float
    backward: float
    both: float


class Numbers(NamedTuple):
    """The numbers that should be equal for target and tunnel."""

    kinds: Mapping[str, Ratio]
    latency: float
    averaging: float

    def compared(self) -> dict[str, float]:
        """The numbers that a verdict compares, by name."""
        return {f"{name} layer": ratio.both for name, ratio in self.kinds.items()} | {
            "latency": self.latency,
            "averaging": self.averaging,
        }


class Scale(NamedTuple):
    """From the target's network to the tunnel's: rates × `rate`, latencies / `time`, bursts × `bytes`."""

    rate: float
    time: float
    """Seconds of the target in one second of the tunnel."""
    bytes: float

    def lines(self, lines: Lines) -> Lines:
        return lines.scaled(self.rate)._replace(latency_s=lines.latency_s / self.time)


def body_of(model: Model, costs: Costs) -> Body:
    """The target's body, from its work. A node with pipeline stages computes as many layers at the same time, and its
    lines carry the payloads of as many: it is taken for one device which is that much faster."""
    stages = len(model.stage_layers)
    ways = [[_seconds(costs, parts) / stages for parts in layer.work] for layer in model.step.layers]
    pass_R = np.sum([forward + backward for forward, backward in ways], axis=0)
    pass_R = pass_R + costs.seconds(model.step.head_forward) + costs.seconds(model.step.head_backward)
    step_R = model.step.passes * pass_R + costs.seconds(model.step.optimizer) + costs.step_s
    rank = int(step_R.argmax())
    step_s = float(step_R[rank]) if stages == 1 else model.simulate(costs, without_limits(model.layout.sites)).step_s
    times = [(float(forward[rank]), float(backward[rank])) for forward, backward in ways]
    return Body(model.step.assignment, kinds_of(model, times), step_s, model.parameters, form_of(model.config))


def kinds_of(model: Model, times_s: list[tuple[float, float]]) -> dict[str, Kind]:
    """Layers by kind, with the mean of their (forward, backward) times in one pass, given by layer."""
    found: dict[str, Kind] = {}
    for name in (COMPRESSED, WHOLE):
        places = [
            place
            for place, layer in enumerate(model.step.layers)
            if layer.payload_bytes and model.payload.compresses(place) == (name == COMPRESSED)
        ]
        if places:
            layers = [model.step.layers[place] for place in places]
            payload_bytes, grad_bytes = (
                float(np.mean([getattr(layer, name) for layer in layers])) for name in ("payload_bytes", "grad_bytes")
            )
            forward_s, backward_s = np.mean([times_s[place] for place in places], axis=0).tolist()
            found[name] = Kind(len(places), payload_bytes, grad_bytes, forward_s, backward_s)
    return found


def numbers(body: Body, lines: Lines, sync_every: int) -> Numbers:
    """The numbers of a body on these lines."""
    kinds = {}
    for name, kind in body.kinds.items():
        forward_s, backward_s = wire_s(body.assignment, kind, lines)
        both = (forward_s + backward_s) / (kind.forward_s + kind.backward_s)
        kinds[name] = Ratio(forward_s / kind.forward_s, backward_s / kind.backward_s, both)
    off_diagonal = ~np.eye(len(lines.up_bps), dtype=bool)
    latency_s = float(lines.latency_s[off_diagonal].max())
    round_s = averaging_s(body.parameters, lines, body.averages_in)
    return Numbers(kinds, latency_s / body.layer_s, round_s / (sync_every * body.step_s))


def wire_s(assignment: Assignment, kind: Kind, lines: Lines) -> tuple[float, float]:
    """The longest time that one layer's payloads, forward, and their gradients, backward, occupy a line."""
    sent = np.zeros((assignment.n_ranks, assignment.n_ranks))
    for chunk in range(assignment.n_chunks):
        for reader in assignment.readers_of(chunk):
            sent[assignment.owner(chunk), reader] += 1
    forward_s, backward_s = (
        max(
            float((bits / lines.link_bps).max()),
            float((bits.sum(1) / lines.up_bps).max()),
            float((bits.sum(0) / lines.down_bps).max()),
        )
        for bits in (8 * kind.payload_bytes * sent, 8 * kind.grad_bytes * sent.T)
    )
    return forward_s, backward_s


def similar(target: Body, small: Body, lines: Lines) -> Scale:
    """The scales that bring the small body's numbers on `lines` nearest to the target's.

    Where kinds of layers need different factors, the largest error is made as small as possible.
    """
    wanted, had = numbers(target, lines, 1), numbers(small, lines, 1)
    off = [had.kinds[name].both / wanted.kinds[name].both for name in wanted.kinds]
    nbytes = [
        (small.kinds[name].payload_bytes + small.kinds[name].grad_bytes)
        / (target.kinds[name].payload_bytes + target.kinds[name].grad_bytes)
        for name in target.kinds
    ]
    return Scale(
        rate=math.sqrt(min(off) * max(off)),
        time=target.layer_s / small.layer_s,
        bytes=math.sqrt(min(nbytes) * max(nbytes)),
    )


def similar_sync(averaging: float, small: Body, lines: Lines, slower: float = 1.0) -> int:
    """The `sync_every` at which averaging has this share of the small body's compute; at least 2, since 1 would average
    gradients. `slower` is the measured over the expected duration of a round."""
    round_s = averaging_s(small.parameters, lines, small.averages_in) * slower
    return max(2, round(round_s / (averaging * small.step_s)))


def _seconds(costs: Costs, stages: Stages) -> Array:
    """Seconds of one layer one way, [R]."""
    return np.sum([costs.seconds(work.total()) for work in stages], axis=0)  # type: ignore[no-any-return]
