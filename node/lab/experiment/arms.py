"""The arms of figure2, and the config that each of them trains.

All arms have the same contexts at the same step: the compressed one begins, as all compressed runs do, with
uncompressed steps, and here those have the whole context. Weights are averaged at the same steps too, but for one
more averaging where the compressed arm takes its basis.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from netem.config import convert
from netem.errors import ConfigError
from node.config import Config, to_tree
from node.lab.measured import COLD_STEPS, LEAST_STEPS

WARMUP_SHARE, ROUNDS = 0.1, 5
"""Share of the steps before the basis is taken, and averagings of weights in a run."""
LR = 1e-3
PASSES = 2
"""The contexts of a step are dealt to so many passes, of which one computes while the payloads of another travel."""
LEAST = 20
"""Fewest steps for which these leave enough to measure."""


class Arm(NamedTuple):
    """One run: a folder's name, a title, compress.mode, settings of the target, and its network where it is another."""

    name: str
    title: str
    mode: str
    settings: tuple[str, ...] = ()
    network: str = ""


ARMS = (
    Arm("centralized", "centralized (100 Gbit/s)", "dense", (), "datacenter-100gbps"),
    Arm(
        "compressed",
        "compressed, all layers",
        "subspace",
        ("--compress.dense_last_layers=0", "--compress.format=bfloat16"),
    ),
    Arm("uncompressed", "uncompressed, bf16", "dense", ("--compress.format=bfloat16",)),
    Arm("topk10", "top-k 10 %", "dense", ("--compress.format=topk10",)),
    Arm("int4", "4-bit", "dense", ("--compress.format=int4",)),
)


def arms_named(names: tuple[str, ...]) -> list[Arm]:
    """These arms; all for no names. Raises `ConfigError` for an unknown name."""
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--arm {unknown[0]}: no such arm; there are {', '.join(known)}")
    return [arm for arm in ARMS if arm.name in names or not names]


def check_steps(steps: int) -> None:
    """Raise `ConfigError` for a number of steps that cannot be shared out among the averagings."""
    if steps < LEAST or steps % (2 * ROUNDS):
        raise ConfigError(f"--steps {steps}: expected a multiple of {2 * ROUNDS}, {LEAST} or more")


def training(small: Config, arm: Arm, profile: Path, steps: int) -> Config:
    """The config of an arm's run on a network. `small` has the arm's [compress]."""
    every = steps // ROUNDS
    tree = to_tree(small)
    tree["run"] |= {"name": arm.name}
    tree["compress"] |= {"mode": arm.mode, "warmup_steps": round(WARMUP_SHARE * steps), "warmup_share": 1.0}
    tree["train"] |= {"steps": steps, "lr": LR, "lr_warmup_steps": every, "sync_every": every}
    tree["train"] |= {"micro_batches": PASSES}
    tree["train"] |= {"eval_every": every, "eval_batches": 2, "checkpoint_every": every}
    tree["net"] = {"profile": str(profile)}
    return convert(Config, tree)


def calibration(small: Config, arm: Arm, profile: Path) -> Config:
    """The config of the short run that shows how fast an arm computes between its waits."""
    tree = to_tree(small)
    steps = 1 + COLD_STEPS + LEAST_STEPS + 1
    tree["run"] |= {"name": f"calibrate-{arm.name}"}
    tree["compress"] |= {"mode": arm.mode}
    tree["train"] |= {"steps": steps, "sync_every": steps, "lr_warmup_steps": steps, "eval_batches": 1}
    tree["train"] |= {"micro_batches": PASSES}
    tree["net"] = {"profile": str(profile)}
    return convert(Config, tree)
