"""A study on disk, NAME.jsonl: the first line says which study it is, each further line holds all figures of one run.

Pages and pictures are made from this file alone, so they can be redrawn without running anything.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from netem.config import Tree
from netem.errors import ConfigError
from node.config import to_tree
from node.lab.study.figures import Result
from node.lab.study.table import DENSE, LOCAL, Arm, Study, load_study

Results = Mapping[str, Sequence[Result]]
"""By arm, in the order of the study; seed by seed, in the same order for every arm."""

Decoded = TypeVar("Decoded")

_NOT_COMPARED = ("run", "net")
"""Sections that change no figure of a study, beside the seed."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a study was asked for: the first line of its file."""

    study: str
    base: str
    """Empty: the study's own."""
    seeds: int
    overrides: tuple[str, ...]
    preset: str = ""
    """A preset under the base; empty: none."""

    @property
    def stem(self) -> str:
        """The name of its files: the study's, followed by the base where that is not the study's own."""
        return f"{self.study}-{self.base}" if self.base else self.study

    @property
    def command(self) -> str:
        """The command line that makes the same figures again."""
        base = ("--base", self.base) if self.base else ()
        preset = ("--preset", self.preset) if self.preset else ()
        seeds = ("--seeds", str(self.seeds))
        return shlex.join(["isthmus", "study", self.study, *base, *preset, *seeds, *self.overrides])

    def load(self) -> Study:
        """The study itself. Raises `ConfigError` as `load_study`."""
        return load_study(self.study, self.base, self.overrides, self.preset)


class _Line(msgspec.Struct):
    """What a page needs of a run. A line may hold more, and all of it is kept."""

    arm: str
    seed: int
    code: str
    host: str
    cpu_s: float
    config: dict[str, dict[str, Any]]
    heldout_loss: float
    heldout_tokens: int
    bytes: dict[str, float]
    curve: list[dict[str, float]]
    position_loss_sum: list[float]
    position_tokens: list[float]
    stable_rank: list[dict[str, Any]]


def record_text(recipe: Recipe, results: Results) -> str:
    """The text of the file."""
    lines = [msgspec.to_builtins(recipe)]
    lines += [{"arm": arm, **result} for arm, arm_results in results.items() for result in arm_results]
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_record(path: Path) -> tuple[Recipe, Study, Results]:
    """Read a file that `record_text` made; the study has only the arms that were run.

    Raises `ConfigError` where the file is none, or where the study has changed since in what the file rests on.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the .jsonl of a study") from None
    recipe = _decoded(lines[0] if lines else b"", Recipe, path, 1)
    results: dict[str, list[Result]] = {}
    for place, text in enumerate(lines[1:], start=2):
        line = _decoded(text, _Line, path, place)
        results.setdefault(line.arm, []).append(json.loads(text))
    study = recipe.load()
    if unknown := results.keys() - {arm.name for arm in study.arms}:
        raise ConfigError(f"{path}: arm {min(unknown)!r} is not in the study {recipe.study}; run the study again")
    for name in (DENSE, LOCAL):
        if name not in results:
            raise ConfigError(f"{path}: holds no run of the arm {name!r}, to which all others are compared")
    for name, runs in results.items():
        if [run["seed"] for run in runs] != list(range(recipe.seeds)):
            raise ConfigError(f"{path}: arm {name!r} should have the seeds 0 to {recipe.seeds - 1}, in this order")
    arms = tuple(arm for arm in study.arms if arm.name in results)
    for arm in arms:
        _check_settings(path, arm, results[arm.name][0]["config"])
    return recipe, replace(study, arms=arms), {arm.name: results[arm.name] for arm in arms}


def kept_runs(path: Path, study: Study) -> dict[tuple[str, int], Result]:
    """The runs of a study that its file holds already, by arm and seed; none where there is no file.

    Raises `ConfigError` where an arm was run with other settings.
    """
    if not path.is_file():
        return {}
    arms = {arm.name: arm for arm in study.arms}
    kept = {}
    for place, text in enumerate(path.read_bytes().splitlines()[1:], start=2):
        line = _decoded(text, _Line, path, place)
        if line.arm in arms:
            _check_settings(path, arms[line.arm], line.config)
            kept[line.arm, line.seed] = json.loads(text)
    return kept


def _decoded(line: bytes, kind: type[Decoded], path: Path, place: int) -> Decoded:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        wanted = "what study this is" if kind is Recipe else "a run of a study"
        raise ConfigError(f"{path}, line {place}: expected {wanted}, as `isthmus study` writes it ({error})") from None


def _check_settings(path: Path, arm: Arm, recorded: Tree) -> None:
    """The page states the study's settings as those of the runs, so they must be. Defaults may have changed since."""
    now = to_tree(arm.config)
    for section, key in _keys(arm.stated):
        if section in _NOT_COMPARED or key not in recorded.get(section, {}):
            continue
        if recorded[section][key] != now[section][key]:
            raise ConfigError(
                f"{path}: arm {arm.name!r} was run with {section}.{key} = {recorded[section][key]!r}, and the study "
                f"now has {now[section][key]!r}; run the study again"
            )


def _keys(tree: Tree) -> Iterator[tuple[str, str]]:
    for section, settings in tree.items():
        for key in settings:
            yield section, key
