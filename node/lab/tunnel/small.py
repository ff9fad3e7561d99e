"""The configs of a tunnel: the target in each of its modes, and the small model that stands for it.

The small model has the target's layers, chunks, ownership, batch, passes and `[compress]`. Its widths and the length of
its chunks are those of another config, or the target's scaled down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from netem.config import convert
from netem.errors import ConfigError
from netem.profile import NetConfig
from node.config import Config, ModelConfig, load_config, to_tree
from node.lab.measured import COLD_STEPS, LEAST_STEPS
from node.train.from_config import payload_format

WIDTH, HEAD_SIZE = 128, 64
"""The built-in shape: wide enough that ranks of 2 % and 5 % are more than rounding."""


class Mode(NamedTuple):
    """One of the three runs."""

    name: str
    compress: str
    network: str
    """A profile's name; empty: the network of the target's config."""


MODES = (
    Mode("centralized", "dense", "datacenter-100gbps"),
    Mode("compressed", "subspace", ""),
    Mode("uncompressed", "dense", ""),
)


def modes_named(names: Sequence[str]) -> list[Mode]:
    """These modes; all for no names. Raises `ConfigError` for an unknown name."""
    known = {mode.name: mode for mode in MODES}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--mode {unknown[0]}: no such mode; there are {', '.join(known)}")
    return [mode for mode in MODES if mode.name in names or not names]


def load_target(name: str, overrides: Sequence[str], preset: str = "") -> Config:
    """The config that a command line calls `name`. Raises `ConfigError` where the tunnel cannot take it."""
    # A target listens nowhere, so it needs no token.
    config = load_config(Path(name), ["--coordinator.address=tcp://127.0.0.1:0", *overrides], preset)
    if config.coordinator.nodes < 2:
        raise ConfigError(f"--nodes {config.coordinator.nodes}: expected 2 or more; one node sends nothing")
    if config.compress.budget_bytes_per_token:
        raise ConfigError("compress.budget_bytes_per_token: the tunnel needs ranks by share, known before the run")
    if config.data.document_masking:
        raise ConfigError(
            "data.document_masking = true: expected false, since the tunnel needs payloads of a size that is known "
            "before the run"
        )
    if config.coordinator.relay == "always":
        raise ConfigError('coordinator.relay = "always": expected "never", since the tunnel scales no relay')
    owners = msgspec.structs.replace(config.coordinator, relay="never")  # which "auto" may stand for
    return msgspec.structs.replace(config, coordinator=owners)


def target_in(config: Config, mode: Mode) -> Config:
    """The target in one of the modes."""
    tree = to_tree(config)
    tree["compress"]["mode"] = mode.compress
    if mode.network:
        tree["net"] = {"profile": mode.network}
    return convert(Config, tree)


def small_config(target: Config, shape: Config | None, steps: int, folder: Path) -> Config:
    """The small model, on no network yet. Raises `ConfigError` where that is impossible."""
    least = 1 + COLD_STEPS + LEAST_STEPS + 1  # the first takes the basis; the last averages weights
    if steps < least:
        raise ConfigError(f"--steps {steps}: expected {least} or more, so that {LEAST_STEPS} count")
    nodes = target.coordinator.nodes
    compress = to_tree(target.compress) | {"warmup_steps": 0, "refresh_every": 0, "unplug_step": 0}
    owners = {key: getattr(target.coordinator, key) for key in ("nodes", "assignment", "chunks_per_node")}
    tree: dict[str, Any] = {
        "run": {"outputs": str(folder), "threads": max(1, (os.cpu_count() or 1) // nodes), "seed": target.run.seed},
        "model": _shape(target.model) if shape is None else _shape_of(shape.model, target.model),
        "compress": compress | {"mode": "subspace"},
        "train": {
            "steps": steps,
            "batch": target.train.batch // target.coordinator.shards,  # of one shard
            "micro_batches": target.train.micro_batches,
            "lr_warmup_steps": steps,
            "sync_format": target.train.sync_format,
            "eval_batches": 1,
        },
        "data": {"tokenizer": "bytes"} if shape is None else to_tree(shape.data),
        "net": {"profile": "unshaped"},
        "coordinator": owners,
    }
    config = convert(Config, tree)
    payload_format(config)  # ranks that leave no room are found here, not in a child
    return config


def run_config(small: Config, mode: Mode, profile: Path, sync_every: int) -> Config:
    """The small model as it runs in a mode."""
    change = msgspec.structs.replace
    return change(
        small,
        run=change(small.run, name=mode.name),
        compress=change(small.compress, mode=mode.compress),
        train=change(small.train, sync_every=sync_every),
        net=NetConfig(profile=str(profile)),
    )


def _shape_of(shape: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    tree = to_tree(shape)
    return tree | {"layers": target.layers, "chunks": target.chunks, "context": shape.chunk_tokens * target.chunks}


def _shape(target: ModelConfig) -> dict[str, Any]:
    """The target's shape at a width of `WIDTH`, with all else in proportion as far as whole heads allow."""
    scale = WIDTH / target.d_model
    heads = max(1, round(target.heads * target.head_size * scale / HEAD_SIZE))
    kv_heads = max(1, round(target.d_kv * scale / HEAD_SIZE))
    while heads % kv_heads:
        kv_heads -= 1
    tokens = max(8, round(target.chunk_tokens * scale))
    return {
        "layers": target.layers,
        "d_model": WIDTH,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": HEAD_SIZE,
        "ffn_dim": max(8, round(target.ffn_dim * scale)),
        "context": target.chunks * tokens,
        "chunks": target.chunks,
        "tied": target.tied,
    }
