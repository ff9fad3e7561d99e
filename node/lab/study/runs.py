"""The runs of a study: arm × seed, each with a checked config and a digest that names its result.

A result belongs to a config, a seed and a version of the code, not to a study: two studies with an arm in common share
the runs of that arm. Results are kept as outputs/study/DIGEST.json; a file appears only when its run is done.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from netem.config import dump_toml
from netem.errors import ConfigError
from node.config import Config, to_tree
from node.lab.study.table import Arm, Study
from node.lab.study.version import code_version

_NO_PART = ("run.name", "run.outputs", "run.resume", "run.threads", "run.recompute", "train.keep_last", "data.cache")
_NO_SECTION = ("net",)


@dataclass(frozen=True)
class Run:
    """One run; `digest` is the name of its result."""

    arm: str
    seed: int
    config: Config
    digest: str

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def runs_of(study: Study, seeds: int) -> list[Run]:
    """All runs, seed by seed, so that an interrupted study has every arm at some of the seeds."""
    return [_run(arm, seed) for seed in range(seeds) for arm in study.arms]


def digest_of(config: Config) -> str:
    """32 hex digits that change with anything on which the figures of a run depend."""
    tree = to_tree(config)
    for key in _NO_PART:
        section, _, name = key.partition(".")
        del tree[section][name]
    for section in _NO_SECTION:
        del tree[section]
    tree["coordinator"] = {"assignment": config.assignment().to_lists()}
    text = code_version() + dump_toml(tree)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_result(folder: Path, run: Run) -> dict[str, Any] | None:
    """The run's result; None where it has not been run. Raises `ConfigError` where the file is not one."""
    path = folder / f"{run.digest}.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON
        result = None
    if not isinstance(result, dict) or result.get("digest") != run.digest:
        raise ConfigError(f"{path}: not the result of a run; delete it, and the study runs {run.label} again")
    return result


def _run(arm: Arm, seed: int) -> Run:
    config = msgspec.structs.replace(arm.config, run=msgspec.structs.replace(arm.config.run, seed=seed))
    return Run(arm.name, seed, config, digest_of(config))
