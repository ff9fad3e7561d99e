"""The Hugging Face folder: config.json, generation_config.json, model.safetensors, and the tokenizer's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from netem.errors import ConfigError, IsthmusError
from node.config import ModelConfig
from node.config.pretrained import rope_json


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Where to write what will be in `folder`: it is renamed after the block, so the folder is whole or not there.

    Raises `ConfigError` where `folder` holds something already, or cannot be made.
    """
    folder = folder.resolve()
    check_free(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.replace(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise IsthmusError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise `ConfigError` where something is at `folder` that an export would overwrite."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty, and nothing is overwritten; give another folder")


def write_folder(folder: Path, weights: Mapping[str, Tensor], files: Mapping[str, Any], about: dict[str, str]) -> None:
    """Write weights and other files (JSON values, or plain text), by name, all or nothing.

    `about` goes into the weights' metadata.
    """
    with whole_folder(folder) as unfinished:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        save_file(dict(weights), unfinished / "model.safetensors", metadata={"format": "pt", **about})


def model_files(model: ModelConfig, vocab_size: int, end_of_text: int | None) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json. Where there is no text (the recall probe), there is no end of it."""
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_dim,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": model.context,
            "rms_norm_eps": model.norm_eps,
            **rope_json(model),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": model.tied,
            "torch_dtype": "float32",
            "use_cache": True,
            **special,
        },
        "generation_config.json": special,
    }
