"""Checkpoints: what a run resumes from to the same losses, and what `isthmus eval` reads.

    outputs/<run>/checkpoint/step-000200/
        model.safetensors     the agreed weights and the basis (rank 0 writes it)
        node-0.safetensors    that node's weights, basis and optimizer moments; the outer step's momentum, the agreed
                              weights and what averaging has left out so far (`node.train.agreed`), and the second
                              moments of K and V that the next refresh of the basis will need, where there are such
                              (each node writes its own)
        COMPLETE.json         written last, by the coordinator, when every node has saved (`coordinator.records.folder`)

Where a node is a site of several processes, each of them writes its shard (node-0.1.safetensors is that of process 1):
its rows of every weight, and of what belongs to a weight. Those of all processes, one under another, are the whole.

Each node's file is enough for that node, so machines need not share a disk: where they do not, the files are handed in
at the coordinator, and a node that lacks its own gets it from there. The trainer's thread only copies the tensors
(`Checkpoints.snapshot`); another one writes them (`node.train.writer`). `node.train.tensor_files` reads and
writes the files, and `node.train.parts` finds what a node goes on from where the number of nodes has changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coordinator.records.folder import checkpoint_folder, drop_before
from netem.errors import ConfigError
from node.model.exchanged import ExchangedLlama
from node.site.sharding import own, own_parameters, rows_of, whole_rows, with_rows
from node.site.site import ALONE, Site
from node.subspace.basis import Moments
from node.subspace.codec import Codec
from node.train.agreed import AgreedWeights
from node.train.basis import restore_basis
from node.train.finite import require_finite
from node.train.parts import PartKey, read_part, shard_files
from node.train.shards import RUNNING
from node.train.tensor_files import CORPUS, MODEL, read_sound, vocab_size_in, write_tensors

_OTHER_MODEL = "it was made with other [model] or [compress] settings"


class Courier(Protocol):
    """Takes files of checkpoints to the coordinator and back (`coordinator.files.courier`)."""

    def hand_in(self, step: int, names: Sequence[str]) -> None: ...

    def fetch(self, step: int, name: str) -> bool: ...


@dataclass(frozen=True)
class Snapshot:
    """One node's part of the checkpoint after `step` steps, as a copy that training does not change any more.

    `files` has the tensors of each file, and `about` what all of these say of themselves.
    """

    step: int
    files: dict[Path, dict[str, Tensor]]
    about: dict[str, str]
    run_folder: Path
    keep_from: int = 0
    """Checkpoints before this step are removed, to make room for this one."""
    courier: Courier | None = None

    def write(self) -> None:
        """Write the files, one after another, and hand them in. Raises `IsthmusError` where the disk fails, or the
        coordinator does not take them."""
        drop_before(self.run_folder, self.keep_from)
        for path, tensors in self.files.items():
            write_tensors(tensors, path, self.about)
        if self.courier is not None:
            self.courier.hand_in(self.step, [path.name for path in self.files])


class Checkpoints:
    """The checkpoints of one run, as one of its `nodes` sees them.

    `corpus` is the fingerprint of the tokens that are trained on; empty where it is not compared. `courier` takes parts
    to the coordinator, and fetches from there those that are not on this machine. `site` are the processes of this
    node.
    """

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        corpus: str = "",
        nodes: int = 1,
        courier: Courier | None = None,
        site: Site = ALONE,
    ) -> None:
        self._part = PartKey(rank, nodes, site.rank, site.size)
        self._site = site
        self._courier = courier
        self._run_folder = run_folder
        self._corpus = corpus

    def snapshot(
        self,
        step: int,
        model: ExchangedLlama,
        optimizer: torch.optim.Optimizer,
        running: Moments | None = None,
        agreed: AgreedWeights | None = None,
        keep_from: int = 0,
    ) -> Snapshot:
        """Copy this node's part of the checkpoint after `step` steps, whose writing will remove those before step
        `keep_from`. All processes of a site call this together. Raises `RunAborted` where a tensor is not finite:
        nothing is to be written then."""
        folder = checkpoint_folder(self._run_folder, step)
        weights = _copies(_weights(model))
        rest = _optimizer_tensors(model, optimizer)
        rest |= {f"{RUNNING}{layer}.{kind}": moment for (layer, kind), moment in (running or {}).items()}
        rest |= agreed.state() if agreed is not None else {}
        part = weights | _copies(rest)
        require_finite(part, f"step {step}: no checkpoint")
        about = {"step": str(step)} | self._part.about()
        about |= {CORPUS: self._corpus} if self._corpus else {}
        files = {folder / self._part.file: part}
        if self._part.rank == 0:
            model_file = whole_rows(model, weights | (agreed.named() if agreed else {}))
            files = ({folder / MODEL: model_file} if self._part.column == 0 else {}) | files
        return Snapshot(step, files, about, self._run_folder, keep_from, self._courier)

    def save(
        self,
        step: int,
        model: ExchangedLlama,
        optimizer: torch.optim.Optimizer,
        running: Moments | None = None,
        agreed: AgreedWeights | None = None,
    ) -> None:
        """Write this node's part at once. Raises as `snapshot` and `Snapshot.write` do."""
        self.snapshot(step, model, optimizer, running, agreed).write()

    def load(
        self, step: int, model: ExchangedLlama, optimizer: torch.optim.Optimizer, agreed: AgreedWeights | None = None
    ) -> Moments:
        """Load the checkpoint after `step` steps; returns this node's running second moments, if any.

        A node goes on from its own part, as if it had never stopped. Where another number of nodes wrote the
        checkpoint, or this node has no part of it here, it goes on from the agreed weights (`node.train.parts`). Raises
        `ConfigError` where there is none, it is not sound, or it is of another step or corpus.
        """
        folder = checkpoint_folder(self._run_folder, step)
        if self._courier is not None:
            with self._site.together():  # one process of a machine fetches for all of them
                if self._site.local_rank == 0:
                    fetch_parts(self._courier, step, self._part.rank, self._part.nodes)
        tensors, is_own = read_part(folder, self._part, self._corpus)
        load_weights(model, tensors)
        _load_optimizer(model, optimizer, tensors)
        if agreed is not None:
            agreed.load(tensors)
            if not is_own:
                agreed.impose()
        return _running_moments(model, tensors)


def fetch_parts(courier: Courier, step: int, rank: int, nodes: int) -> None:
    """Get what rank `rank` of `nodes` goes on from, as far as the coordinator has it: the parts of the old ranks that
    are dealt to it (`node.train.parts`), or where there are none, any part."""
    for old in itertools.count(rank, nodes):
        if not _fetch_node(courier, step, old):
            if old == rank:
                _fetch_node(courier, step, 0)
            return


def _fetch_node(courier: Courier, step: int, rank: int) -> bool:
    """Get the file of one node, or those of all its processes; whether there is one."""
    if courier.fetch(step, PartKey(rank).file):
        return True
    return sum(1 for _ in itertools.takewhile(partial(courier.fetch, step), shard_files(rank))) > 0


def shared_state(
    model: ExchangedLlama, optimizer: torch.optim.Optimizer, running: Moments, agreed: AgreedWeights
) -> dict[str, Tensor]:
    """What a node that joins gets of this one, by the names of a checkpoint: the agreed weights in place of the own."""
    state = _weights(model) | agreed.named() | _optimizer_tensors(model, optimizer)
    state |= {f"{RUNNING}{layer}.{kind}": moment for (layer, kind), moment in running.items()}
    return state | agreed.momentum()


def join_state(
    tensors: dict[str, Tensor], model: ExchangedLlama, optimizer: torch.optim.Optimizer, agreed: AgreedWeights
) -> Moments:
    """Take what `shared_state` gave on another node; returns the running second moments, which are zeros. Raises
    `ConfigError` where it is not of this model."""
    load_weights(model, tensors)
    optimizer.state.clear()
    _load_optimizer(model, optimizer, tensors)
    agreed.join(tensors)
    return _running_moments(model, tensors)


def load_weights(model: ExchangedLlama, tensors: dict[str, Tensor]) -> None:
    """Put saved weights and basis into the model. Raises `ConfigError` where they are of another model."""
    _take_ranks(model, tensors)
    weights = _weights(model)
    parameters = dict(model.named_parameters())
    tensors = {name: rows_of(parameters[name], t) if name in parameters else t for name, t in tensors.items()}
    # Codecs may be left aside: a compressed model can be looked at as a dense one.
    strays = [
        name
        for name in tensors.keys() - weights.keys()
        if not name.startswith(("optimizer.", "outer.", RUNNING)) and "codecs" not in name
    ]
    if strays:
        raise ConfigError(f"checkpoint: {min(strays)} is in it and not in the model: {_OTHER_MODEL}")
    for name, tensor in weights.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ConfigError(f"checkpoint: {name} is {found}, the model wants {tuple(tensor.shape)}: {_OTHER_MODEL}")
        with torch.no_grad():
            tensor.copy_(tensors[name])
    restore_basis(model)


def _take_ranks(model: ExchangedLlama, tensors: dict[str, Tensor]) -> None:
    """Where a run chooses ranks, enter those that it chose in the model's table."""
    if model.ranks.chosen:
        return
    ranks = {}
    for (layer, kind), codec in model.codecs():
        saved = tensors.get(f"layers.{layer}.self_attn.codecs.{kind}.leading")
        ranks[layer, kind] = 0 if saved is None else _rank_with(codec, saved.shape[-1])
    model.ranks.choose(ranks)
    for _, codec in model.codecs():
        codec.fit()


def _rank_with(codec: Codec, columns: int) -> int:
    """The rank that takes so many principal directions; 0 where there is none, and the shapes will not fit."""
    return next((rank for rank in range(columns + 1) if codec.columns(rank) == columns), 0)


def load_model(folder: Path, model: ExchangedLlama, corpus: str = "") -> None:
    """Load the agreed weights of one checkpoint folder. Raises `ConfigError` where they are not finite, or `corpus`, if
    given, is not the fingerprint of what they were trained on."""
    load_weights(model, read_sound(folder / MODEL, corpus))


def vocab_size_of(folder: Path) -> int:
    """How many tokens the model of a checkpoint folder knows: the rows of its embedding."""
    return vocab_size_in(folder / MODEL)


def _weights(model: ExchangedLlama) -> dict[str, Tensor]:
    """Parameters and basis by name; a tied head is the embedding, and is written once."""
    return own_parameters(model) | dict(model.named_buffers())


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, row by row."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _optimizer_tensors(model: ExchangedLlama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = own(value) if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensors


def _load_optimizer(model: ExchangedLlama, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is not None:
                saved = rows_of(parameter, saved)
                if key != "step" and saved.shape != own(parameter).shape:
                    raise ConfigError(f"checkpoint: optimizer.{key}.{name} is {tuple(saved.shape)}: {_OTHER_MODEL}")
                optimizer.state[parameter][key] = saved if key == "step" else with_rows(parameter, saved)


def _running_moments(model: ExchangedLlama, tensors: dict[str, Tensor]) -> Moments:
    device = model.embed_tokens.weight.device
    named = {key: f"{RUNNING}{key[0]}.{key[1]}" for key, _ in model.codecs()}
    return {key: tensors[name].to(device) for key, name in named.items() if name in tensors}
