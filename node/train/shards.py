"""Puts together what the processes of a site have written, each its own rows, so that any other layout can go on.

A process has, under a weight's name, its rows of it, and the same of all that belongs to the weight (the optimizer's
moments, the outer step's momentum). Those of all processes, one under another, are the whole. What codecs have is whole
on every process, and running second moments are parts of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from netem.errors import ConfigError
from node.train.file_digest import read_about
from node.train.tensor_files import read_sound

RUNNING = "running."
"""Before the layer and kind of a running second moment."""

COLUMNS = "columns"
"""The key in a part's metadata that says how many processes the site had."""


def joined(paths: Sequence[Path], corpus: str = "") -> dict[str, Tensor]:
    """The whole of what one node has written: one file, or those of all its processes in order. Raises `ConfigError`
    where one is missing or not sound."""
    columns = int(read_about(paths[0]).get(COLUMNS, "1"))
    if len(paths) != columns:
        raise ConfigError(
            f"{paths[0]}: {len(paths)} of the files of this site's {columns} processes are here; a run with another "
            "number of processes goes on from all of them, so copy the others here"
        )
    parts = [read_sound(path, corpus) for path in paths]
    return parts[0] if columns == 1 else {name: _join(name, [part[name] for part in parts]) for name in parts[0]}


def _join(name: str, parts: Sequence[Tensor]) -> Tensor:
    if name.startswith(RUNNING):
        return torch.stack(list(parts)).sum(0)
    if ".codecs." in name or name.startswith("optimizer.step."):
        return parts[0]
    return torch.cat(list(parts))
