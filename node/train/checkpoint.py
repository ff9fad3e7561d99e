"""Checkpoints: what a run resumes from to the same losses, and what `isthmus eval` reads.

    outputs/<run>/checkpoint/step-000200/
        model.safetensors     the agreed weights and the basis (rank 0 writes it)
        node-0.safetensors    that node's weights, basis, optimizer moments, the outer step's momentum, and the second
                              moments of K and V that the next refresh of the basis will need, where there are such
                              (each node writes its own)
        COMPLETE.json         written last, by the coordinator, when every node has saved (`coordinator.records.folder`)

Each node's file is enough for that node, so machines need not share a disk. Tensors only; nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coordinator.records.folder import checkpoint_folder, whole_file
from netem.errors import ConfigError, IsthmusError
from node.model.exchanged import ExchangedLlama
from node.subspace.basis import Moments
from node.subspace.codec import Codec
from node.train.basis import restore_basis
from node.train.outer import OuterStep

_RUNNING = "running."
"""Before the layer and kind of a running second moment."""

_VELOCITY = "outer.velocity"
"""The outer step's momentum, of all weights in a row."""

_OTHER_MODEL = "it was made with other [model] or [compress] settings"


class Checkpoints:
    """The checkpoints of one run, as one node sees them."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._run_folder = run_folder
        self._rank = rank

    def save(
        self,
        step: int,
        model: ExchangedLlama,
        optimizer: torch.optim.Optimizer,
        running: Moments | None = None,
        outer: OuterStep | None = None,
    ) -> None:
        """Write this node's part of the checkpoint after `step` steps."""
        folder = checkpoint_folder(self._run_folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _weights(model).items()}
        if self._rank == 0:
            _write(weights, folder / "model.safetensors", {"step": str(step)})
        moments = _optimizer_tensors(model, optimizer)
        for (layer, kind), moment in (running or {}).items():
            moments[f"{_RUNNING}{layer}.{kind}"] = moment.cpu().contiguous()
        if outer is not None and outer.velocity is not None:
            moments[_VELOCITY] = outer.velocity
        _write({**weights, **moments}, folder / f"node-{self._rank}.safetensors", {"step": str(step)})

    def load(
        self, step: int, model: ExchangedLlama, optimizer: torch.optim.Optimizer, outer: OuterStep | None = None
    ) -> Moments:
        """Load this node's part of the checkpoint after `step` steps; returns its running second moments, if any.
        Raises `ConfigError` where it is not there."""
        tensors = _read(checkpoint_folder(self._run_folder, step) / f"node-{self._rank}.safetensors")
        load_weights(model, tensors)
        _load_optimizer(model, optimizer, tensors)
        if outer is not None and outer.has_momentum:
            outer.velocity = _velocity(model, tensors)
        return _running_moments(model, tensors)


def load_weights(model: ExchangedLlama, tensors: dict[str, Tensor]) -> None:
    """Put saved weights and basis into the model. Raises `ConfigError` where they are of another model."""
    _take_ranks(model, tensors)
    own = _weights(model)
    # Codecs may be left aside: a compressed model can be looked at as a dense one.
    strays = [
        name
        for name in tensors.keys() - own.keys()
        if not name.startswith(("optimizer.", "outer.", _RUNNING)) and "codecs" not in name
    ]
    if strays:
        raise ConfigError(f"checkpoint: {min(strays)} is in it and not in the model: {_OTHER_MODEL}")
    for name, tensor in own.items():
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


def load_model(folder: Path, model: ExchangedLlama) -> None:
    """Load the agreed weights of one checkpoint folder."""
    load_weights(model, _read(folder / "model.safetensors"))


def vocab_size_of(folder: Path) -> int:
    """How many tokens the model of a checkpoint folder knows: the rows of its embedding."""
    path = folder / "model.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            return int(tensors.get_slice("embed_tokens.weight").get_shape()[0])
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; the node of rank 0 wrote it on its own machine") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None


def _weights(model: ExchangedLlama) -> dict[str, Tensor]:
    """Parameters and basis by name; a tied head is the embedding, and is written once."""
    state = dict(model.named_parameters())
    return state | dict(model.named_buffers())


def _optimizer_tensors(model: ExchangedLlama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _load_optimizer(model: ExchangedLlama, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is not None:
                if key != "step" and saved.shape != parameter.shape:
                    raise ConfigError(f"checkpoint: optimizer.{key}.{name} is {tuple(saved.shape)}: {_OTHER_MODEL}")
                place = torch.device("cpu") if key == "step" else parameter.device
                optimizer.state[parameter][key] = saved.to(place)


def _velocity(model: ExchangedLlama, tensors: dict[str, Tensor]) -> Tensor:
    elements = sum(parameter.numel() for parameter in model.parameters())
    saved = tensors.get(_VELOCITY)
    if saved is None or saved.shape != (elements,):
        found = "missing" if saved is None else tuple(saved.shape)
        raise ConfigError(f"checkpoint: {_VELOCITY} is {found}, train.outer_momentum wants ({elements},)")
    return saved


def _running_moments(model: ExchangedLlama, tensors: dict[str, Tensor]) -> Moments:
    device = model.embed_tokens.weight.device
    named = {key: f"{_RUNNING}{key[0]}.{key[1]}" for key, _ in model.codecs()}
    return {key: tensors[name].to(device) for key, name in named.items() if name in tensors}


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file, whole or not at all. Raises `IsthmusError` for a full disk."""
    try:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt", **metadata})
    except (safetensors.SafetensorError, OSError) as error:
        raise IsthmusError(f"{path}: cannot be written: {error}") from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; every node resumes from the file that it wrote itself") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {error}") from None
    return tensors
