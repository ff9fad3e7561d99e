"""The shape of a Llama that lies in a Hugging Face folder: config.json read into [model], and [model] written into it.

`llama_shape` takes only what this project's decoder computes exactly; all else is refused by name. The weights are read
by `node.model.hf`. No torch here: the shape is part of the configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from netem.config import Tree, flat, merge, user_path
from netem.errors import ConfigError
from netem.explain import show
from node.config.model import ModelConfig, RopeScaling

CONFIG_JSON = "config.json"
_Kind = TypeVar("_Kind", bound=msgspec.Struct)

ONLY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
"""Keys of config.json that may have one value only; where they are left out, they have it."""


class LlamaFile(msgspec.Struct):
    """The keys of config.json on which the function that a Llama computes depends, with the defaults of `transformers`'
    LlamaConfig. Where it says None, `_rope` and `llama_shape` say what follows."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


def read_json(path: Path, kind: type[_Kind]) -> _Kind:
    """The JSON object in `path`, as `kind`; other keys are ignored. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        keys = " and ".join(kind.__struct_fields__)
        raise ConfigError(f"{path}: expected a JSON object with {keys} ({error})") from None


def llama_file(folder: Path) -> LlamaFile:
    """The config.json of a Llama. Raises `ConfigError` where the folder holds none, or another architecture's."""
    path = folder / CONFIG_JSON
    if not path.is_file():
        what = "holds no config.json" if folder.is_dir() else "no such folder"
        raise ConfigError(f"model.init = {str(folder)!r}: {what}; give the Hugging Face folder of a Llama")
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: expected a JSON object ({error})") from None
    for key, only in ONLY.items():
        found = content.get(key, only)
        if found != only and not (key == "quantization_config" and not found):
            mend = "save the model dequantised" if key == "quantization_config" else f"expected {show(only)}"
            shown = found.get("quant_method", "yes") if isinstance(found, dict) else found
            raise ConfigError(f"{path}: {key} = {show(shown)}: this decoder has no such Llama; {mend}")
    try:
        return msgspec.convert(content, LlamaFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: not the config of a Llama: {error}") from None


def llama_shape(folder: Path) -> Tree:
    """What the folder fixes of [model], as nested values.

    Raises `ConfigError` for what the decoder does not compute.
    """
    file = llama_file(folder)
    if not file.head_dim and file.hidden_size % file.num_attention_heads:
        raise ConfigError(
            f"{folder / CONFIG_JSON}: hidden_size = {file.hidden_size}: expected a multiple of num_attention_heads = "
            f"{file.num_attention_heads}, or head_dim"
        )
    return {
        "layers": file.num_hidden_layers,
        "d_model": file.hidden_size,
        "heads": file.num_attention_heads,
        "kv_heads": file.num_key_value_heads or file.num_attention_heads,
        "head_dim": file.head_dim or file.hidden_size // file.num_attention_heads,
        "ffn_dim": file.intermediate_size,
        "norm_eps": file.rms_norm_eps,
        "tied": file.tie_word_embeddings,
        **_rope(file, folder / CONFIG_JSON),
    }


def _rope(file: LlamaFile, path: Path) -> Tree:
    """rope_theta and rope_scaling, from the keys of either generation of `transformers`."""
    said = {"rope_theta": file.rope_theta} | (file.rope_scaling or {}) | (file.rope_parameters or {})
    kind = said.get("rope_type", said.get("type", "default"))
    plain = msgspec.to_builtins(RopeScaling())
    if kind == "default":
        return {"rope_theta": float(said["rope_theta"]), "rope_scaling": plain}
    if kind != "llama3":
        raise ConfigError(f"{path}: rope_type = {kind!r}: expected default or llama3; no other scaling is built in")
    keys = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
    keys["original_context"] = "original_max_position_embeddings"
    missing = [key for key in keys.values() if not isinstance(said.get(key), int | float)]
    if missing:
        raise ConfigError(f"{path}: rope_type = 'llama3' needs a number for {', '.join(missing)}")
    scaling = {name: float(said[key]) for name, key in keys.items()}
    return {
        "rope_theta": float(said["rope_theta"]),
        "rope_scaling": scaling | {"original_context": int(scaling["original_context"])},
    }


def with_folder(tree: Tree) -> Tree:
    """`tree` with the shape that the folder of `model.init` fixes, where it names one.

    A tree that gives all of that already may name a folder which is not on this machine: a coordinator needs no
    weights, and neither does a run that goes on. Raises `ConfigError` where a key is given and differs.
    """
    model = tree.get("model", {})
    init = model.get("init") if isinstance(model, dict) else None
    if not isinstance(init, str) or not init:
        return tree
    folder, given = user_path(init, "model.init"), flat(model)
    if not folder.exists() and given.keys() >= _FIXED:
        return tree
    shape = llama_shape(folder)
    for key, fixed in flat(shape).items():
        if key in given and given[key] != fixed:
            raise ConfigError(
                f"model.{key} = {show(given[key])}: {folder / CONFIG_JSON} says {show(fixed)}; leave the key out where "
                f"model.init is given"
            )
    return merge(tree, {"model": shape})


_FIXED = frozenset(flat(msgspec.to_builtins(ModelConfig()))) - {"init", "context", "chunks"}


def rope_json(model: ModelConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling as config.json has them."""
    scaling = model.rope_scaling
    if scaling.factor == 1:
        return {"rope_theta": model.rope_theta}
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }
