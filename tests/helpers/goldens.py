"""The golden runs: a few steps of a tiny model in every kind of mode, in one process, over one node and several.

`figures_of` runs one and gives what is kept of it: the loss of each step, and the norm and the digest of the
gradients of one pass.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helpers.coordinated import train
from helpers.small import contexts
from helpers.worlds import WORLDS, loss_and_gradients, tiny_config
from node.subspace.basis import digest

FIGURES = Path(__file__).parents[1] / "golden" / "figures.json"


class Case(NamedTuple):
    """A world, and settings laid over those of `worlds.tiny_config`."""

    world: str
    compress: dict[str, Any]
    train: dict[str, Any] = {}  # noqa: RUF012  (never written to)


CASES: dict[str, Case] = {
    "dense, one node": Case("1", {"mode": "dense"}, {"sync_every": 1}),
    "dense, four nodes": Case("4", {"mode": "dense"}, {"sync_every": 1}),
    "geodesic, one node": Case("1", {}, {"sync_every": 1}),
    "geodesic, zigzag": Case("zigzag", {}, {"sync_every": 1}),
    "geodesic, averaging of weights": Case("2x2", {}, {"sync_every": 3, "outer_momentum": 0.9, "outer_lr": 0.7}),
    "learned in int4 by budget": Case(
        "4",
        {
            "subspace": "learned",
            "rotation": "fixed",
            "format": "int4",
            "dense_format": "bfloat16",
            "dense_last_layers": 0,
            "budget_bytes_per_token": 24.0,
        },
        {"sync_every": 1},
    ),
    "own projected, theta handed on, a basis a head": Case(
        "3+1", {"own": "projected", "theta": "previous", "scope": "head", "dense_last_layers": 0}, {"sync_every": 1}
    ),
    "taylor2 in int8, refreshed": Case(
        "2x2", {"rotation": "taylor2", "format": "int8", "refresh_every": 2, "warmup_steps": 1}, {"sync_every": 1}
    ),
}


def processor() -> str:
    """What decides the last bits: the processor's model, its vector units, torch."""
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in described if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def figures_of(name: str, folder: Path) -> dict[str, Any]:
    """Run one case."""
    case = CASES[name]
    world: Sequence[Sequence[int]] = WORLDS[case.world]
    config = tiny_config(compress=case.compress, train=case.train)
    shared, _ = train(config, world, folder)
    figures: dict[str, Any] = {"losses": shared.losses()}
    if not config.compress.budget_bytes_per_token:  # whose ranks are not chosen before a run
        loss, gradients = loss_and_gradients(config, world, contexts(config))
        names = sorted(gradients)
        figures["pass_loss"] = loss
        figures["gradient_norms"] = [float(gradients[key].double().norm()) for key in names]
        figures["gradients"] = digest(gradients[key] for key in names)
    else:
        figures["gradient_norms"] = []
    return figures
