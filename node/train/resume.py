"""Going on with a run: from which step, and whether what is asked for is still the same run. No torch here.

A resumed run gives the losses of one that never stopped only if all that they depend on is as it was. So every setting
must be as it was, with three exceptions: those that say where and how long a run goes, the learning rate (a run that
diverged goes on with a lower one), and the step of unplugging while it lies ahead. What does change is in the log.
"""

from __future__ import annotations

import logging
from typing import Any

from coordinator.records.folder import CONFIG, METRICS, latest_complete, read_mark
from coordinator.records.lock import check_unlocked
from coordinator.records.metrics import read_records
from netem.config import flat, load_toml
from netem.errors import ConfigError
from node.config import Config, recorded_config, to_tree

log = logging.getLogger("isthmus.resume")

MAY_CHANGE = (
    *("run.outputs", "run.device", "run.threads", "run.recompute", "run.resume", "net.", "coordinator.", "data.cache"),
    "model.init",  # the weights are those of the checkpoint
    *("train.steps", "train.eval_every", "train.eval_batches", "train.checkpoint_every"),
    *("train.lr", "train.nonfinite"),
)
"""Keys, and sections with their dot, that a resumed run may have otherwise."""

CHANGES_RESULTS = ("train.lr", "compress.unplug_step")
"""Keys that may change, and with them the losses: the log says so."""

UNPLUG_STEP = "compress.unplug_step"


def start_step(config: Config) -> int:
    """How many steps are done already: 0 for a new run, else those of its last complete checkpoint.

    Raises `ConfigError` where a new run would write over another, or this config cannot go on from what there is.
    """
    folder = config.run.folder
    if not config.run.resume:
        if (folder / METRICS).exists():
            raise ConfigError(
                f"run.name = {config.run.name!r}: {folder} holds a run already; "
                "choose another name, or go on with it by run.resume = true"
            )
        return 0
    checkpoint = latest_complete(folder)
    if checkpoint is None:
        raise ConfigError(
            f"run.resume = true: {folder} holds no complete checkpoint to go on from; "
            "name a run that has one (run.name), or leave run.resume out"
        )
    done, nodes = read_mark(checkpoint)
    _check_same(config, done)
    if nodes != config.coordinator.nodes:
        raise ConfigError(
            f"coordinator.nodes = {config.coordinator.nodes}: {checkpoint} was written by {nodes} "
            f"nodes, and each goes on from its own file; set coordinator.nodes = {nodes}"
        )
    if done >= config.train.steps:
        raise ConfigError(
            f"train.steps = {config.train.steps}: {checkpoint} has that many already; raise train.steps to go on"
        )
    if (folder / METRICS).exists():
        read_records(folder / METRICS)
    return done


def check_can_start(config: Config) -> None:
    """What a process that starts a coordinator checks first, and the coordinator checks again. Raises `ConfigError`."""
    check_unlocked(config.run.folder)
    start_step(config)


def log_changes(config: Config) -> None:
    """Say in the log how a resumed run will differ from one that never stopped; before its config is written over."""
    for key, (before, now) in _changes(config).items() if config.run.resume else ():
        if key in CHANGES_RESULTS:
            log.info("%s = %r from here on; it was %r before", key, now, before)


def _check_same(config: Config, done: int) -> None:
    for key, (before, now) in _changes(config).items():
        if not _may_change(key) and not _unplugs_later(key, before, now, done):
            raise ConfigError(
                f"{key} = {now!r}: the run to go on with has {before!r}; give it as it was, or start a new run"
            )


def _changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """What the run was recorded with, and what is asked for now, of each key where they differ."""
    before, now = flat(to_tree(recorded_config(load_toml(config.run.folder / CONFIG)))), flat(to_tree(config))
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.startswith(tuple(entry for entry in MAY_CHANGE if entry.endswith(".")))


def _unplugs_later(key: str, before: Any, now: Any, done: int) -> bool:
    """Whether `key` is the step of unplugging and every step done so far is the same with both values."""
    return key == UNPLUG_STEP and all(step == 0 or step >= done for step in (before, now))
