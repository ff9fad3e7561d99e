"""The runs of a study: arm × seed, each with a checked config and a digest that names its result.

A result belongs to a config, a seed and a version of the code, not to a study: two studies with an arm in common share
the runs of that arm. Results are kept as outputs/study/DIGEST.json; a file appears only when its run is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from netem.config import dump_toml
from netem.errors import ConfigError
from node.config import Config, to_tree
from node.lab.study.table import Study
from node.lab.study.version import code_version

_NO_PART = ("run.name", "run.outputs", "run.resume", "run.threads", "run.recompute", "train.keep_last", "data.cache")
_NO_SECTION = ("net",)


@dataclass(frozen=True)
class Run:
    """One run; `digest` is the name of its result. `trunk` is the run from whose weights it starts, if any, and `noise`
    is laid over them (`table.Arm`). A trunk itself keeps its weights, as outputs/study/DIGEST.safetensors."""

    arm: str
    seed: int
    config: Config
    digest: str
    trunk: Run | None = None
    noise: float = 0.0
    keeps_weights: bool = False

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def runs_of(study: Study, seeds: int) -> list[Run]:
    """All runs of arms, seed by seed, so that an interrupted study has every arm at some of the seeds."""
    runs = []
    for seed in range(seeds):
        trunk = None
        for stage in study.trunk:
            trunk = _run("trunk", stage, seed, trunk, keeps_weights=True)
        runs += [_run(arm.name, arm.config, seed, trunk, arm.noise) for arm in study.arms]
    return runs


def from_trunks(runs: Sequence[Run], trunks: Mapping[int, str]) -> list[Run]:
    """The same runs, from the trunks whose digests are given by seed, though other code has trained them."""
    found = []
    for run in runs:
        digest = trunks.get(run.seed, "")
        trunk = replace(run.trunk, digest=digest, trunk=None) if run.trunk and digest else run.trunk
        own = digest_of(run.config, trunk.digest, run.noise) if trunk else run.digest
        found.append(replace(run, trunk=trunk, digest=own))
    return found


def with_trunks(runs: Sequence[Run]) -> list[Run]:
    """The same runs, each trunk before the first of its arms."""
    found: dict[str, Run] = {}
    for run in runs:
        for one in _stages(run):
            found.setdefault(one.digest, one)
    return list(found.values())


def _stages(run: Run) -> list[Run]:
    """What a run needs, and the run itself, in order."""
    return [*(_stages(run.trunk) if run.trunk else []), run]


def digest_of(config: Config, trunk: str = "", noise: float = 0.0) -> str:
    """32 hex digits that change with anything on which the figures of a run depend."""
    tree = to_tree(config)
    for key in _NO_PART:
        section, _, name = key.partition(".")
        del tree[section][name]
    for section in _NO_SECTION:
        del tree[section]
    tree["coordinator"] = {"assignment": config.assignment().to_lists()}
    start = f"{trunk} {noise}" if trunk or noise else ""
    text = code_version() + start + dump_toml(tree)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def weights_path(folder: Path, run: Run) -> Path:
    """Where the weights of a run are kept that others start from."""
    return folder / f"{run.digest}.safetensors"


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


def _run(
    arm: str, config: Config, seed: int, trunk: Run | None = None, noise: float = 0.0, keeps_weights: bool = False
) -> Run:
    config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, seed=seed))
    digest = digest_of(config, trunk.digest if trunk else "", noise)
    return Run(arm, seed, config, digest, trunk, noise, keeps_weights)
