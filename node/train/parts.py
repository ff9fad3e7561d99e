"""Which file of a checkpoint a node goes on from, where its own does not tell it all.

A node's own part brings it back to where it was, if as many nodes go on as wrote the checkpoint. With another number of
nodes, or on a machine that has no part of this rank, a node takes what all nodes have agreed on (weights, basis, ranks,
the outer step's momentum) from any part, and the optimizer's moments with it. With gradients averaged in each step
these are equal on all nodes. Otherwise they are those of one node, and the others' are lost.

Some tensors are parts of a sum over nodes: the running second moments, and what averaging has left out. These are dealt
anew: rank r of N' takes the sum of those of the old ranks r, r + N', and so on. A part that is not on this machine is
left out of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from netem.errors import ConfigError
from node.train.agreed import RESIDUAL
from node.train.file_digest import read_about
from node.train.tensor_files import read_sound

log = logging.getLogger("isthmus.checkpoint")

RUNNING = "running."
"""Before the layer and kind of a running second moment."""

NODES, RANK = "nodes", "rank"
"""Keys in a part's metadata: how many nodes wrote the checkpoint, and which of them wrote this part."""


def part_name(rank: int) -> str:
    """The name of one node's file."""
    return f"node-{rank}.safetensors"


def read_part(folder: Path, rank: int, nodes: int, corpus: str = "") -> tuple[dict[str, Tensor], bool]:
    """What rank `rank` of `nodes` goes on from, and whether it is this rank's own part of as many nodes.

    Raises `ConfigError` where there is nothing, or it is not sound.
    """
    here = ranks_here(folder)
    own = folder / part_name(rank)
    if rank in here and read_about(own).get(NODES) == str(nodes):
        return read_sound(own, corpus), True
    if not here:
        raise ConfigError(
            f"{own}: is missing, and so is every other node's; copy one node's file here, or set run.outputs to a "
            "folder that all nodes share"
        )
    return _dealt_anew(folder, rank, nodes, corpus, here), False


def ranks_here(folder: Path) -> list[int]:
    """The ranks, rising, of which a part is on this machine."""
    names = (re.fullmatch(r"node-(\d{1,9})\.safetensors", path.name, re.ASCII) for path in folder.glob("node-*"))
    return sorted(int(match[1]) for match in names if match)


def _dealt_anew(folder: Path, rank: int, nodes: int, corpus: str, here: list[int]) -> dict[str, Tensor]:
    base = rank if rank in here else here[rank % len(here)]
    tensors = read_sound(folder / part_name(base), corpus)
    log.info("%s: goes on as rank %d of %d from the agreed weights", folder / part_name(base), rank, nodes)
    shares = [
        tensors if old == base else read_sound(folder / part_name(old), corpus) for old in here if old % nodes == rank
    ]
    summed = {name for name in tensors if name.startswith(RUNNING) or name == RESIDUAL}
    return tensors | {name: _sum((share[name] for share in shares if name in share), tensors[name]) for name in summed}


def _sum(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    return sum(parts, start=torch.zeros_like(like))
