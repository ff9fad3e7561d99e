"""The stable rank of W_Q, W_K and W_V by layer: over the training of a study, and in a checkpoint on disk.

Stable rank is ‖W‖²_F / ‖W‖²₂, given as a share of the greatest rank that W could have (paper, LLaMA-70B: Q, K ≈ 0.1 %,
V ≈ 0.5 %). A checkpoint is a Hugging Face folder of a Llama-like model, read tensor by tensor from its safetensors.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from netem.errors import ConfigError
from netem.tables import markdown_table
from node.config.pretrained import read_json
from node.lab.study.figures import Result
from node.lab.study.measure import stable_rank
from node.model.hf import opened, weight_files

Ranks = dict[int, dict[str, float]]
"""By layer, and in it by "q", "k" and "v"."""

_PROJECTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.([qkv])_proj\.weight")


def checkpoint_ranks(folder: Path) -> Ranks:
    """Stable ranks of every layer of a Hugging Face folder. Raises `ConfigError` where it holds no Llama-like weights,
    or not all of those that its index and config.json name."""
    ranks: Ranks = {}
    for path in weight_files(folder):
        with opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                if match := _PROJECTION.fullmatch(name):
                    weight = _matrix(path, name, tensors.get_tensor(name))
                    ranks.setdefault(int(match[1]), {})[match[2]] = stable_rank(weight)
    if not ranks or any(layer.keys() != set("qkv") for layer in ranks.values()):
        raise ConfigError(f"{folder}: expected layers.N.self_attn.{{q,k,v}}_proj.weight of every layer, as Llama has")
    layers = _config_layers(folder)
    if layers is not None and ranks.keys() != set(range(layers)):
        held = ", ".join(map(str, sorted(ranks)))
        raise ConfigError(f"{folder}: holds the layers {held}, and config.json says {layers} layers; is it complete?")
    return dict(sorted(ranks.items()))


def _config_layers(folder: Path) -> int | None:
    """The number of layers that the checkpoint should have, where it says so."""
    path = folder / "config.json"
    return read_json(path, _ModelConfig).num_hidden_layers if path.is_file() else None


class _ModelConfig(msgspec.Struct):
    num_hidden_layers: int | None = None


def _matrix(path: Path, name: str, weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        form = f"{weight.dtype} of shape {'×'.join(map(str, weight.shape))}"
        raise ConfigError(f"{path}: {name} is {form}; expected a matrix of floating-point numbers, not packed")
    if not weight.float().isfinite().all():
        raise ConfigError(f"{path}: {name} holds numbers that are not finite; it has no stable rank")
    return weight


def checkpoint_table(ranks: Ranks) -> str:
    """Markdown of a checkpoint's ranks."""
    rows = [[str(layer), *(f"{kinds[kind]:.2%}" for kind in "qkv")] for layer, kinds in ranks.items()]
    means = [f"{statistics.fmean(kinds[kind] for kinds in ranks.values()):.2%}" for kind in "qkv"]
    return markdown_table(["layer", "Q", "K", "V"], [*rows, ["mean", *means]], align="lr")


def training_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Markdown of the stable ranks over training: mean over layers and seeds, and the last layer's at the end."""
    rows = []
    for arm, of_arm in results.items():
        for place, entry in enumerate(of_arm[0]["stable_rank"]):
            layers = [layer for result in of_arm for layer in result["stable_rank"][place]["layers"]]
            means = [f"{statistics.fmean(layer[kind] for layer in layers):.2%}" for kind in "qkv"]
            rows.append([arm, str(entry["step"]), *means])
    return markdown_table(["arm", "step", "Q", "K", "V"], rows, align="lr")


def layer_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Markdown of the stable ranks at the end of training, by layer: mean over seeds."""
    rows = []
    for arm, of_arm in results.items():
        last = [result["stable_rank"][-1]["layers"] for result in of_arm]
        for layer in range(len(last[0])):
            means = [f"{statistics.fmean(layers[layer][kind] for layers in last):.2%}" for kind in "qkv"]
            rows.append([arm, str(layer), *means])
    return markdown_table(["arm", "layer", "Q", "K", "V"], rows, align="lr")
