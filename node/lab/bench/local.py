"""A step of one node without a network, against a plain Llama of equal shapes: time and peak memory.

Each is a process of its own, since memory is the process's. For the times they make their steps in turns, so that other
load on the machine affects both alike; memory is measured in processes of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from netem.children import Child, Children
from node.config import load_config, save_config

ANSWER_S = 120.0
COLD_STEPS = 2
MEMORY_STEPS = 4
KINDS = ("plain", "isthmus")
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give freed memory back at once (mallopt(3))."""


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
    plain_s, isthmus_s = _times_s(config_path, rounds, folder)
    plain_bytes, isthmus_bytes = (_peak_bytes(kind, config_path, folder) for kind in KINDS)
    return Local(chunks, plain_s, isthmus_s, plain_bytes, isthmus_bytes)


def _times_s(config_path: Path, rounds: int, folder: Path) -> tuple[float, ...]:
    """The median time of a step of each kind."""
    with Children() as children:
        processes = {kind: _start(children, kind, config_path, folder, {}) for kind in KINDS}
        times_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(COLD_STEPS + rounds):
            for kind, process in processes.items():
                times_s[kind] += _step(process)["times_s"]
    return tuple(median(times_s[kind][COLD_STEPS:]) for kind in KINDS)


def _peak_bytes(kind: str, config_path: Path, folder: Path) -> int:
    """The peak of a process that gives freed memory back at once: what its step holds, without the holes that the
    allocator keeps for later. Those depend on the order of sizes, and grow for some steps."""
    with Children() as children:
        process = _start(children, kind, config_path, folder, AT_ONCE)
        return int([_step(process)["peak_bytes"] for _ in range(MEMORY_STEPS)][-1])


def _step(process: Child) -> dict[str, Any]:
    process.tell(b"1")
    answer: dict[str, Any] = json.loads(process.hear(ANSWER_S))
    return answer


def _start(children: Children, kind: str, config_path: Path, folder: Path, allocator: dict[str, str]) -> Child:
    command = [sys.executable, "-m", "node.lab.bench.local_step", str(config_path), kind]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"} | allocator
    process = children.start(
        f"the {kind} step", command, log_path=folder / "local.log", environment=environment, talks=True
    )
    process.hear(ANSWER_S)
    return process
