"""A step of one node without a network, against a plain Llama of equal shapes: time and peak memory.

Each is a process of its own, since memory is the process's. They make their steps in turns, so that other load on the
machine affects both alike.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from netem.children import Child, Children
from node.config import load_config, save_config

ANSWER_S = 120.0
COLD_STEPS = 2


class Local(NamedTuple):
    """Medians over steps."""

    chunks: int
    plain_s: float
    isthmus_s: float
    plain_bytes: int
    isthmus_bytes: int


def measure_local(path: Path, chunks: int, rounds: int, folder: Path) -> Local:
    """Measure with the context in so many chunks, all of one node. Raises `IsthmusError` where a process fails."""
    config = load_config(
        path,
        [
            *("--coordinator.nodes=1", "--coordinator.chunks_per_node=[]", "--coordinator.assignment=contiguous"),
            *(f"--model.chunks={chunks}", "--compress.mode=dense", "--net.profile=unshaped"),
        ],
    )
    config_path = folder / f"local-{chunks}.toml"
    save_config(config, config_path)
    with Children() as children:
        kinds = ("plain", "isthmus")
        processes = {kind: _start(children, kind, config_path, folder) for kind in kinds}
        for process in processes.values():
            process.hear(ANSWER_S)
        times_s: dict[str, list[float]] = {kind: [] for kind in kinds}
        peak_bytes: dict[str, int] = {}
        for _ in range(COLD_STEPS + rounds):
            for kind, process in processes.items():
                process.tell(b"1")
                answer = json.loads(process.hear(ANSWER_S))
                times_s[kind] += answer["times_s"]
                peak_bytes[kind] = answer["peak_bytes"]
    plain_s, isthmus_s = (median(times_s[kind][COLD_STEPS:]) for kind in kinds)
    return Local(chunks, plain_s, isthmus_s, *(peak_bytes[kind] for kind in kinds))


def _start(children: Children, kind: str, config_path: Path, folder: Path) -> Child:
    command = [sys.executable, "-m", "node.lab.bench.local_step", str(config_path), kind]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}
    return children.start(
        f"the {kind} step", command, log_path=folder / "local.log", environment=environment, talks=True
    )
