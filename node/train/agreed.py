"""The weights that all nodes agree on, and how averaging rounds move them and this node's own.

A round over a part of the weights sends each node's change since the last agreement, takes the outer step on their
mean, and gives all nodes the same agreed weights. A part is the whole, or a fragment (`node.train.fragments`). While a
fragment travels, its weights train on. When the round is committed, the node's own weights become the mean of the
agreed ones and of what they are by then (Streaming DiLoCo, arXiv 2501.18512; docs/bench/streaming.md tries others).

A fragment under way is given up with its generation (`drop`): agreed weights, momentum and residual stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coordinator.messages import Round
from netem.errors import ConfigError
from node.config import TrainConfig
from node.site.sharding import is_sharded, own_parameters, rows_of
from node.subspace.basis import digest
from node.train.averaging import Averager, Flight, flatten, unflatten_into
from node.train.finite import require_finite
from node.train.fragments import cut
from node.train.outer import OuterStep
from node.train.ring_formats import RING_FORMATS
from node.train.schedule import WEIGHTS, StepSchedule

_VELOCITY, _AGREED, RESIDUAL = "outer.velocity", "outer.agreed", "outer.residual"
"""Names in a checkpoint: the outer step's momentum, the agreed weights where the own are others, and what formats with
few bits have left out so far. All of them are flat, fragment after fragment."""

OWN_SHARE = 0.5
"""How much of a node's own weights is kept where agreed ones arrive after it has trained on."""


@dataclass(frozen=True)
class _Part:
    """Some of the weights: the tensors, and their place in the flat vectors."""

    tensors: list[Tensor]
    place: slice


@dataclass(frozen=True)
class _Begun:
    """A round that is under way."""

    round_id: int
    flight: Flight


class AgreedWeights:
    """One node's copy of what all agree on. `vector` holds the agreed weights, [parameters] in float32; where the model
    is sharded over a site, those of this process's shard, on which its column agrees."""

    vector: Tensor

    def __init__(self, train: TrainConfig, schedule: StepSchedule, model: nn.Module) -> None:
        self.outer = OuterStep(train)
        self.residual: Tensor | None = None
        self._train, self._schedule = train, schedule
        self._parameters = dict(model.named_parameters())
        self._named = own_parameters(model)
        self._begun: _Begun | None = None
        self.restart()

    def restart(self) -> None:
        """The weights, which are now equal on all nodes, are the agreed ones. Momentum and residual are of weights
        before them, and do not fit any more."""
        sizes = {name: tensor.numel() for name, tensor in self._named.items()}
        fragments = cut(sizes, self._train.sync_fragments)
        self._order = [name for names in fragments for name in names]
        self._parts = {WEIGHTS: _Part([self._named[name] for name in self._order], slice(0, sum(sizes.values())))}
        start = 0
        for kind, names in zip(self._schedule.fragment_kinds(), fragments, strict=True):
            stop = start + sum(sizes[name] for name in names)
            self._parts[kind] = _Part([self._named[name] for name in names], slice(start, stop))
            start = stop
        self.vector = self.own()
        self.outer.velocity = self.residual = None

    def own(self) -> Tensor:
        """This node's own weights, flat, in the order of `vector`."""
        return flatten(self._parts[WEIGHTS].tensors)

    def averages(self, kind: str) -> bool:
        """Whether a round of this kind averages weights."""
        return kind in self._parts

    def begin(self, averager: Averager, entry: Round, step: int) -> None:
        """Send a fragment on its way as `step` begins."""
        assert self._begun is None, "one fragment is under way at a time"
        change = self._change(averager.rank, entry)
        form = RING_FORMATS[self._schedule.sync_format(step)]
        flight = averager.begin(entry.round_id, change, form, self._left(self._parts[entry.kind]))
        self._begun = _Begun(entry.round_id, flight)

    def average(self, averager: Averager, entry: Round, step: int) -> str:
        """Agree on a part of the weights at the end of `step`: one that was sent on its way before, or else by a round
        that holds the step up. Returns the digest of what was agreed.

        Raises `RunAborted` where the round is aborted; nothing has changed then.
        """
        part = self._parts[entry.kind]
        begun = self._begun if self._begun and self._begun.round_id == entry.round_id else None
        if begun:
            self._begun = None
            result = averager.finish(entry.round_id, begun.flight)
        else:
            change = self._change(averager.rank, entry)
            form = RING_FORMATS[self._schedule.sync_format(step)]
            result = averager.sum(entry.round_id, change, form, self._left(part))
        agreed = self.vector[part.place]
        agreed += self.outer(result.total, len(self.vector), part.place)
        require_finite({"their average": agreed}, f"step {step}: no agreed weights")
        self._keep(part, result.residual)
        with torch.no_grad():
            unflatten_into(agreed.lerp(flatten(part.tensors), OWN_SHARE) if begun else agreed, part.tensors)
        return digest([agreed])

    def drop(self) -> None:
        """The generation is over: what was under way in it counts for nothing."""
        self._begun = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the own weights. Where the model is sharded, by the weights' names, so that
        the rows of all processes can be put together."""
        assert self._begun is None, "no fragment is under way at a checkpoint"
        found = {_VELOCITY: self.outer.velocity, RESIDUAL: self.residual}
        found |= {_AGREED: self.vector} if self._train.streams else {}
        flat = {key: tensor for key, tensor in found.items() if tensor is not None}
        if not any(is_sharded(parameter) for parameter in self._parameters.values()):
            return flat
        return {f"{key}.{name}": rows for key, vector in flat.items() for name, rows in self._by_name(vector).items()}

    def named(self) -> dict[str, Tensor]:
        """The agreed weights by name, where the own may be others."""
        if self._train.sync_every == 1:
            return {}
        return self._by_name(self.vector)

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector, in the order of `vector`, as the weights' own tensors."""
        found = {name: torch.empty_like(self._named[name], device="cpu") for name in self._order}
        unflatten_into(vector, found.values())
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave, after the own weights were loaded. Raises `ConfigError` where it is not there or does
        not fit."""
        self.restart()
        if self.outer.has_momentum:
            self.outer.velocity = self._saved(tensors, _VELOCITY, "train.outer_momentum")
        if self._train.streams:
            self.vector = self._saved(tensors, _AGREED, "train.sync_fragments")
        if any(name.startswith(RESIDUAL) for name in tensors):
            self.residual = self._saved(tensors, RESIDUAL, "train.sync_format")

    def momentum(self) -> dict[str, Tensor]:
        """The outer step's momentum by its name in a checkpoint, where there is one yet."""
        return {} if self.outer.velocity is None else {_VELOCITY: self.outer.velocity}

    def join(self, tensors: dict[str, Tensor]) -> None:
        """Begin with another node's agreed weights, which are the own by now, and its momentum, where it has one yet.
        Raises `ConfigError` where that does not fit."""
        self.restart()
        if _VELOCITY in tensors:
            self.outer.velocity = self._saved(tensors, _VELOCITY, "train.outer_momentum")

    def impose(self) -> None:
        """The agreed weights become this node's own."""
        with torch.no_grad():
            unflatten_into(self.vector, self._parts[WEIGHTS].tensors)

    def _saved(self, tensors: dict[str, Tensor], name: str, key: str) -> Tensor:
        saved, wanted = self._flat(tensors, name), tuple(self.vector.shape)
        if saved is None or tuple(saved.shape) != wanted:
            found = "missing" if saved is None else tuple(saved.shape)
            raise ConfigError(f"checkpoint: {name} is {found}, {key} wants ({wanted[0]},)")
        return saved

    def _flat(self, tensors: dict[str, Tensor], key: str) -> Tensor | None:
        """What was saved under `key`, flat in the order of `vector`; None where there is nothing. It may be of another
        layout: flat and whole, or by the weights' names."""
        vector, names = tensors.get(key), list(self._parameters)
        if vector is not None and vector.shape != self.vector.shape:
            sizes = {name: parameter.numel() for name, parameter in self._parameters.items()}
            order = [name for names in cut(sizes, self._train.sync_fragments) for name in names]
            if len(vector) != sum(sizes.values()):
                return vector
            parts = zip(order, vector.split([sizes[name] for name in order]), strict=True)
            found = {name: part.view(self._parameters[name].shape) for name, part in parts}
        elif all(f"{key}.{name}" in tensors for name in names):
            found = {name: tensors[f"{key}.{name}"] for name in names}
        else:
            return vector
        return flatten(rows_of(self._parameters[name], found[name]) for name in self._order)

    def _change(self, rank: int, entry: Round) -> Tensor:
        """This node's weighted change since the last agreement."""
        part = self._parts[entry.kind]
        return (flatten(part.tensors) - self.vector[part.place]) * entry.weights[rank]

    def _left(self, part: _Part) -> Tensor | None:
        return None if self.residual is None else self.residual[part.place]

    def _keep(self, part: _Part, residual: Tensor | None) -> None:
        if residual is not None:
            if self.residual is None:
                self.residual = torch.zeros_like(self.vector)
            self.residual[part.place] = residual
