"""The runs of a study: arm × seed, each with a config that was checked and a digest that names its result.

A result is of a config, a seed and a version of the code, not of a study: two studies that share an arm share its
runs. Where results lie: outputs/study/DIGEST.json, one file a run, there only when the run is done.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from netem.config import dump_toml
from node.config import Config, to_tree
from node.lab.study.table import Arm, Study
from node.lab.study.version import code_version

_NO_PART = ("run.name", "run.outputs", "run.resume", "run.threads", "data.cache")
_NO_SECTION = ("net",)


@dataclass(frozen=True)
class Run:
    """One run: `digest` names its result."""

    arm: str
    seed: int
    config: Config
    digest: str

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def plan(study: Study, seeds: int) -> list[Run]:
    """All runs, seed by seed, so that a study that is broken off has whole tables of fewer seeds."""
    return [_run(arm, seed) for seed in range(seeds) for arm in study.arms]


def digest_of(config: Config) -> str:
    """32 hex digits of what the figures of a run depend on."""
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
    """The run's result, if it is there."""
    path = folder / f"{run.digest}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result


def _run(arm: Arm, seed: int) -> Run:
    config = msgspec.structs.replace(arm.config, run=msgspec.structs.replace(arm.config.run, seed=seed))
    return Run(arm.name, seed, config, digest_of(config))
