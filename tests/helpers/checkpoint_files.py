"""A checkpoint's files, altered as if they had been written so: their digests fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors
from torch import Tensor

from node.train.tensor_files import write_tensors

Tensors = dict[str, Tensor]


def rewrite(path: Path, change: Callable[[Tensors], Tensors | None], **about: str) -> None:
    """Write a file anew: what `change` returns, or has changed in place, and `about` beside what it said of itself."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors file is no mapping)
        said = dict(file.metadata() or {})
    changed = change(tensors)
    write_tensors(tensors if changed is None else changed, path, said | about)
