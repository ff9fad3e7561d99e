"""Llama weights in a Hugging Face folder: read whole, by name, into the model; and named as `transformers` names them.

`init_weights` starts a run from such a folder. Every tensor that the model has must be there in its shape, and nothing
else may be: what is left over would be part of another function of the tokens. The shape comes from
`node.config.pretrained`. Safetensors only; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch
from torch import Tensor, nn

from netem.errors import ConfigError
from node.config.data import is_folder
from node.config.pretrained import llama_file, read_json
from node.model.exchanged import ExchangedLlama

INDEX = "model.safetensors.index.json"
READABLE = (torch.float32, torch.bfloat16, torch.float16)
_BUFFER = "rotary_emb.inv_freq"
"""Old checkpoints keep RoPE's frequencies, which follow from the config."""


class Index(msgspec.Struct):
    """The file of each tensor, by name."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The files of the index, or all where there is none. Raises `ConfigError` where one is missing."""
    index = folder / INDEX
    if not index.is_file():
        if files := sorted(folder.glob("*.safetensors")):
            return files
        raise ConfigError(f"{folder}: holds no .safetensors file; give the folder of a Hugging Face checkpoint")
    files = sorted({folder / name for name in read_json(index, Index).weight_map.values()})
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{folder}: its index.json names {path.name}, which is not there; fetch all of its files")
    return files


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises `ConfigError` where it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors ({error})") from None


def to_hf(name: str) -> str:
    """The name that LlamaForCausalLM gives to our parameter `name`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_hf(name: str) -> str:
    """Our name of LlamaForCausalLM's parameter `name`."""
    return name.removeprefix("model.")


def embedded_tokens(folder: Path, tokenizer: str, vocab_size: int) -> int:
    """How many tokens the Llama in `folder` embeds. Raises `ConfigError` where the data's tokens, `vocab_size` of
    `tokenizer`, are not its own."""
    embedded = llama_file(folder).vocab_size
    if vocab_size > embedded or (vocab_size < embedded and not is_folder(tokenizer)):
        raise ConfigError(
            f"data.tokenizer = {tokenizer!r}: makes data of {vocab_size} tokens, and {folder} embeds "
            f"{embedded}; set data.tokenizer to the folder that holds its tokenizer.json"
        )
    return embedded


def init_weights(model: ExchangedLlama, folder: Path) -> None:
    """Put the weights in `folder` into the model, as float32. Raises `ConfigError` where they are not all of them, or
    more, or of other shapes, or not finite."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if ".codecs." not in name}
    tied = model.lm_head.weight is model.embed_tokens.weight
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with opened(path) as tensors:
            for hf_name in tensors.keys():  # noqa: SIM118 (it is no dict)
                name = from_hf(hf_name)
                if name.endswith(_BUFFER) or (tied and name == "lm_head.weight"):
                    continue
                if name not in wanted:
                    raise ConfigError(f"{path}: {hf_name} has no place in a Llama of this shape; give a plain Llama")
                if name in found:
                    raise ConfigError(f"{path}: {hf_name} is in {found[name].name} too; delete the file that is stale")
                _put(wanted[name], tensors.get_tensor(hf_name), f"{path}: {hf_name}")
                found[name] = path
    _check_whole(wanted, found, folder)


def _check_whole(wanted: Mapping[str, nn.Parameter], found: Mapping[str, Path], folder: Path) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{folder}: {to_hf(missing[0])}{more} is in none of its files; fetch all of them")


def _put(parameter: nn.Parameter, tensor: Tensor, place: str) -> None:
    if tensor.dtype not in READABLE:
        raise ConfigError(f"{place} is {tensor.dtype}; expected float32, bfloat16 or float16, so dequantise it first")
    if tensor.shape != parameter.shape:
        raise ConfigError(
            f"{place} is {_form(tensor)}, and config.json asks for {_form(parameter)}; fetch the folder anew, "
            f"all files from one place"
        )
    if not bool(tensor.isfinite().all()):
        raise ConfigError(f"{place} holds numbers that are not finite; fetch the file anew")
    with torch.no_grad():
        parameter.copy_(tensor)


def _form(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))
