"""Going on with a run: from which step, and whether what is asked for is still the same run. No torch here.

A resumed run gives the losses of one that never stopped only if all that they depend on is as it was. So every setting
must be as it was, with three exceptions: those that say where, with how many nodes and how long a run goes, the
learning rate (a run that diverged goes on with a lower one), and the step of unplugging while it lies ahead. What does
change is in the log.

A checkpoint that is damaged is refused by name, and the run goes on from the one before it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.records.folder import CONFIG, METRICS, complete_checkpoints, read_mark, set_aside, step_of
from coordinator.records.lock import check_unlocked
from coordinator.records.metrics import read_records
from netem.config import flat, load_toml
from netem.errors import ConfigError
from node.config import Config, recorded_config, to_tree
from node.train.file_digest import check_digest

log = logging.getLogger("isthmus.resume")

MAY_CHANGE = (
    *("run.outputs", "run.device", "run.threads", "run.recompute", "run.resume", "net.", "coordinator.", "data.cache"),
    *("run.trace", "run.profile", "run.tracker"),
    "model.init",  # the weights are those of the checkpoint
    *("train.steps", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "train.keep_last"),
    "train.collect",
    *("train.lr", "train.nonfinite"),
)
"""Keys, and sections with their dot, that a resumed run may have otherwise."""

CHANGES_RESULTS = ("train.lr", "compress.unplug_step")
"""Keys that may change, and with them the losses: the log says so."""

UNPLUG_STEP = "compress.unplug_step"


class Refused(NamedTuple):
    """A checkpoint that is not gone on from, and why."""

    checkpoint: Path
    reason: str


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
    checkpoint, refused = last_sound(folder)
    if checkpoint is None:
        if refused:
            raise ConfigError(f"{refused[0].reason}; no checkpoint before it can be gone on from")
        raise ConfigError(
            f"run.resume = true: {folder} holds no complete checkpoint to go on from; "
            "name a run that has one (run.name), or leave run.resume out"
        )
    done = step_of(checkpoint)
    _check_same(config, done)
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


def last_sound(run_folder: Path) -> tuple[Path | None, list[Refused]]:
    """The last complete checkpoint whose mark is right and whose files on this machine are as they were written, if
    there is one; and those after it, each with what is wrong with it."""
    refused: list[Refused] = []
    for checkpoint in complete_checkpoints(run_folder):
        try:
            read_mark(checkpoint)
            for path in sorted(checkpoint.glob("*.safetensors")):
                check_digest(path)
        except ConfigError as error:
            refused.append(Refused(checkpoint, str(error)))
        else:
            return checkpoint, refused
    return None, refused


def set_refused_aside(config: Config) -> None:
    """Rename the checkpoints that a resumed run does not go on from, since its own will take their names."""
    _, refused = last_sound(config.run.folder) if config.run.resume else (None, [])
    for checkpoint, _ in refused:
        log.warning("%s is kept as %s", checkpoint, set_aside(checkpoint).name)


def log_changes(config: Config) -> None:
    """Say in the log how a resumed run will differ from one that never stopped; before its config is written over."""
    checkpoint, refused = last_sound(config.run.folder) if config.run.resume else (None, [])
    for entry in refused:
        log.warning("%s; the run goes on from %s", entry.reason, checkpoint)
    if checkpoint is not None and (nodes := read_mark(checkpoint).nodes) != config.coordinator.nodes:
        log.info(
            "%d nodes go on from the weights that %d nodes had agreed on%s",
            config.coordinator.nodes,
            nodes,
            "" if config.train.sync_every == 1 else "; a node that is new takes the optimizer's moments of another",
        )
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
