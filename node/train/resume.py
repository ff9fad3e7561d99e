"""Going on with a run: from which step, and whether what is asked for is still the same run. No torch here.

A resumed run gives the losses of one that never stopped only if all that they depend on is as it was. So every
setting must be, but for those that say where and how long a run goes, not what it computes.
"""

from __future__ import annotations

from typing import Any

from coordinator.records.folder import CONFIG, METRICS, latest_complete, nodes_of, step_of
from netem.errors import ConfigError
from node.config import Config, load_config, to_tree

MAY_CHANGE = (
    *("run.outputs", "run.device", "run.threads", "run.resume", "net.", "coordinator.", "data.cache"),
    *("train.steps", "train.eval_every", "train.eval_batches", "train.checkpoint_every"),
)
"""Keys, and sections with their dot, that a resumed run may have otherwise."""


def start_step(config: Config) -> int:
    """How many steps are done already: 0 for a new run, else those of its last complete checkpoint.

    Raises `ConfigError` where a new run would write over another, or there is nothing that this config can go on from.
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
    _check_same(config)
    if nodes_of(checkpoint) != config.coordinator.nodes:
        raise ConfigError(
            f"coordinator.nodes = {config.coordinator.nodes}: {checkpoint} was written by {nodes_of(checkpoint)} "
            f"nodes, and each goes on from its own file; set coordinator.nodes = {nodes_of(checkpoint)}"
        )
    if step_of(checkpoint) >= config.train.steps:
        raise ConfigError(
            f"train.steps = {config.train.steps}: {checkpoint} has that many already; raise train.steps to go on"
        )
    return step_of(checkpoint)


def _check_same(config: Config) -> None:
    before, now = _flat(to_tree(load_config(config.run.folder / CONFIG))), _flat(to_tree(config))
    for key, value in now.items():
        if before.get(key) != value and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key} = {value!r}: the run to go on with has {before.get(key)!r}; "
                "give it as it was, or start a new run"
            )


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
