"""The stable rank of W_Q, W_K and W_V, by layer: over the training of a study, and of a checkpoint on disk.

Stable rank is ‖W‖²_F / ‖W‖²₂, given as a share of the greatest rank that W could have (paper, LLaMA-70B: Q, K ≈ 0.1 %,
V ≈ 0.5 %). A checkpoint is a Hugging Face folder of a Llama-like model, read tensor by tensor from its safetensors.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors

from netem.errors import ConfigError
from node.lab.study.document import table
from node.lab.study.figures import Result
from node.lab.study.measure import stable_rank

Ranks = dict[int, dict[str, float]]
"""By layer, by "q", "k" and "v"."""

_PROJECTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.([qkv])_proj\.weight")


def checkpoint_ranks(folder: Path) -> Ranks:
    """Of every layer of a Hugging Face folder. Raises `ConfigError` where it holds no Llama-like weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no .safetensors file; give the folder of a Hugging Face checkpoint")
    ranks: Ranks = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    if match := _PROJECTION.fullmatch(name):
                        ranks.setdefault(int(match[1]), {})[match[2]] = stable_rank(tensors.get_tensor(name))
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as safetensors ({error})") from None
    if not ranks or any(layer.keys() != set("qkv") for layer in ranks.values()):
        raise ConfigError(f"{folder}: expected layers.N.self_attn.{{q,k,v}}_proj.weight of every layer, as Llama has")
    return dict(sorted(ranks.items()))


def checkpoint_table(ranks: Ranks) -> str:
    """Markdown of a checkpoint's ranks."""
    rows = [[str(layer), *(f"{kinds[kind]:.2%}" for kind in "qkv")] for layer, kinds in ranks.items()]
    means = [f"{statistics.fmean(kinds[kind] for kinds in ranks.values()):.2%}" for kind in "qkv"]
    return table(["layer", "Q", "K", "V"], [*rows, ["mean", *means]])


def training_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Markdown of the stable ranks over training: mean over layers and seeds, and the last layer's at the end."""
    rows = []
    for arm, of_arm in results.items():
        for place, entry in enumerate(of_arm[0]["stable_rank"]):
            layers = [layer for result in of_arm for layer in result["stable_rank"][place]["layers"]]
            means = [f"{statistics.fmean(layer[kind] for layer in layers):.2%}" for kind in "qkv"]
            rows.append([arm, str(entry["step"]), *means])
    return table(["arm", "step", "Q", "K", "V"], rows)


def layer_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Markdown of the stable ranks at the end of training, by layer: mean over seeds."""
    rows = []
    for arm, of_arm in results.items():
        last = [result["stable_rank"][-1]["layers"] for result in of_arm]
        for layer in range(len(last[0])):
            means = [f"{statistics.fmean(layers[layer][kind] for layers in last):.2%}" for kind in "qkv"]
            rows.append([arm, str(layer), *means])
    return table(["arm", "layer", "Q", "K", "V"], rows)
