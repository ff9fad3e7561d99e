"""Which file of a checkpoint a node goes on from, where its own does not tell it all.

A node's own part brings it back to where it was, if as many nodes go on as wrote the checkpoint. With another number of
nodes, or on a machine that has no part of this rank, a node takes what all nodes have agreed on (weights, basis, ranks,
the outer step's momentum) from any part, and the optimizer's moments with it. With gradients averaged in each step
these are equal on all nodes. Otherwise they are those of one node, and the others' are lost.

A node that is a site of several processes has a part for each of them (`node.train.shards`). With another number of
processes a site is what it was: the parts are put together, and cut anew.

Some tensors are parts of a sum over nodes: the running second moments, and what averaging has left out. These are dealt
anew: rank r of N' takes the sum of those of the old ranks r, r + N', and so on. A part that is not on this machine is
left out of it.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from netem.errors import ConfigError
from node.train.agreed import RESIDUAL
from node.train.file_digest import read_about
from node.train.shards import COLUMNS, RUNNING, joined
from node.train.tensor_files import read_sound

log = logging.getLogger("isthmus.checkpoint")

NODES, RANK = "nodes", "rank"
"""Keys in a part's metadata: how many nodes wrote the checkpoint, and which of them wrote this part."""


@dataclass(frozen=True)
class PartKey:
    """Whose part it is: that of rank `rank` of `nodes`, and there of process `column` of `columns`."""

    rank: int
    nodes: int = 1
    column: int = 0
    columns: int = 1

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"node-{self.rank}{f'.{self.column}' if self.columns > 1 else ''}.safetensors"

    def about(self) -> dict[str, str]:
        """What the file says of itself."""
        about = {RANK: str(self.rank), NODES: str(self.nodes)}
        return about | ({COLUMNS: str(self.columns)} if self.columns > 1 else {})


def shard_files(rank: int) -> Iterator[str]:
    """The names of the files of a node's processes, one after another."""
    return (f"node-{rank}.{column}.safetensors" for column in itertools.count())


def read_part(folder: Path, key: PartKey, corpus: str = "") -> tuple[dict[str, Tensor], bool]:
    """What a process goes on from, and whether its node wrote it, in a run of as many nodes.

    Weights, and what belongs to them, are this process's own rows where as many processes wrote them, and else whole.
    Raises `ConfigError` where there is nothing, or it is not sound.
    """
    here = parts_here(folder)
    own = folder / key.file
    if own.exists() and read_about(own).items() >= key.about().items():
        return read_sound(own, corpus), True
    if not here:
        raise ConfigError(
            f"{own}: is missing, and so is every other node's; copy one node's file here, or set run.outputs to a "
            "folder that all nodes share"
        )
    same = key.rank in here and read_about(here[key.rank][0]).get(NODES) == str(key.nodes)
    found = joined(here[key.rank], corpus) if same else _dealt_anew(key, corpus, here)
    return found if key.column == 0 else {name: _without_sums(name, found[name]) for name in found}, same


def parts_here(folder: Path) -> dict[int, list[Path]]:
    """The files on this machine by rank, rising; those of a site's processes in their order."""
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("node-*"):
        if match := re.fullmatch(r"node-(\d{1,9})(?:\.(\d{1,9}))?\.safetensors", path.name, re.ASCII):
            found.setdefault(int(match[1]), {})[int(match[2] or 0)] = path
    return {rank: [paths[column] for column in sorted(paths)] for rank, paths in sorted(found.items())}


def _dealt_anew(key: PartKey, corpus: str, here: dict[int, list[Path]]) -> dict[str, Tensor]:
    rank, nodes, ranks = key.rank, key.nodes, list(here)
    base = rank if rank in here else ranks[rank % len(ranks)]
    tensors = joined(here[base], corpus)
    log.info("%s: goes on as rank %d of %d from the agreed weights", here[base][0], rank, nodes)
    shares = [tensors if old == base else joined(here[old], corpus) for old in ranks if old % nodes == rank]
    summed = {name for name in tensors if name.startswith((RUNNING, RESIDUAL))}
    return tensors | {name: _sum((share[name] for share in shares if name in share), tensors[name]) for name in summed}


def _without_sums(name: str, tensor: Tensor) -> Tensor:
    """A part of a sum over processes goes on with the first one of a site."""
    return torch.zeros_like(tensor) if name.startswith(RUNNING) else tensor


def _sum(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    return sum(parts, start=torch.zeros_like(like))
