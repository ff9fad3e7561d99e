"""A study as data: a table of arms over a base. The files are in `tables/`, the bases in `tables/bases/`.

    title = "…"                       one line
    text = "…"                        what it asks, in a few sentences
    base = "novels-bytes"             the config that all arms share
    settings.compress.warmup_steps = 50      laid over the base, for all arms (optional)
    [arms.dense]                      an arm and what it lays over that; the order is that of the tables
    compress.mode = "dense"
    [arms."dense again"]
    noise = 1e-6                      noise on the weights from which this arm starts (optional)

A base may have a trunk, in one stage or several (`[[trunk]]`), each with settings that it lays over itself. A trunk is
trained first, once for each seed, each stage from the weights of the one before, and every arm of that seed starts
from the last one's weights. So arms differ in nothing but their settings. A base may also have a `note`, which then
stands on every page of a study on it.

A value such as "25 % of train.steps" stands for that number of steps, so that a whole study can be made shorter with
one setting; a share below 100 % is always fewer than all steps. Two arms have fixed names, `DENSE` and `LOCAL`, since
all others are compared to them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from netem.config import Tree, apply_overrides, convert, load_toml, merge
from netem.errors import ConfigError
from node.config import Config
from node.config.pretrained import with_folder
from node.config.tree import with_preset

DENSE, LOCAL = "dense", "local-only"
_SHARE = re.compile(r"(\d+(?:\.\d+)?) % of train\.steps")
_KEYS = {"title", "text", "base", "settings", "arms"}


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    config: Config
    settings: Tree
    """What it lays over the base, as in the file."""
    stated: Tree
    """All that base, study, arm and command line say, as values of the config; what is left are defaults."""
    noise: float = 0.0
    """Noise on the weights from which it starts: standard deviation, as a share of each tensor's own."""


@dataclass(frozen=True)
class Study:
    """A table whose arms have all been checked."""

    name: str
    title: str
    text: str
    base: str
    arms: tuple[Arm, ...]
    trunk: tuple[Config, ...] = ()
    """The stages of what is trained before the arms, from whose weights they start."""
    note: str = ""
    """What is to be known of all studies on the base."""


def study_names() -> list[str]:
    """Every study there is."""
    return _names(_tables())


def base_names() -> list[str]:
    """Every base there is."""
    return _names(_tables() / "bases")


def load_study(name: str, base: str = "", overrides: Sequence[str] = (), preset: str = "") -> Study:
    """The study called `name`, on `base` in place of its own, with the command line's settings over all arms and the
    preset, if one is named, under the base.

    Raises `ConfigError` for a name that is not there, and for any arm whose settings do not make a config.
    """
    tree = _load(_tables(), name, "study")
    assert tree.keys() <= _KEYS and {DENSE, LOCAL} <= tree["arms"].keys(), name  # noqa: PT018
    base = base or tree["base"]
    ground = with_preset(_load(_tables() / "bases", base, "base"), preset)
    note = ground.pop("note", "")
    trunk = tuple(_arm(name, "trunk", ground, over, ()).config for over in ground.pop("trunk", []))
    shared = merge(ground, tree.get("settings", {}))
    arms = tuple(_arm(name, arm, shared, settings, overrides) for arm, settings in tree["arms"].items())
    return Study(name, tree["title"], tree["text"], base, arms, trunk, note)


def _arm(study: str, name: str, shared: Tree, settings: Tree, overrides: Sequence[str]) -> Arm:
    laid = {key: value for key, value in settings.items() if key != "noise"}
    tree = _with_steps(apply_overrides(merge(shared, laid), overrides))
    try:
        return Arm(name, convert(Config, with_folder(tree)), settings, tree, settings.get("noise", 0.0))
    except ConfigError as error:
        raise ConfigError(f"study {study}, arm {name!r}: {error}") from None


def _with_steps(tree: Tree) -> Tree:
    """The same with shares of the steps resolved to numbers of steps."""
    steps = tree.get("train", {}).get("steps")

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(inner) for key, inner in value.items()}
        match = _SHARE.fullmatch(value) if isinstance(value, str) else None
        if not match or not isinstance(steps, int):
            return value
        percent = float(match.group(1))
        return round(percent / 100 * steps) if percent >= 100 else min(round(percent / 100 * steps), steps - 1)

    resolved = resolve(tree)
    assert isinstance(resolved, dict)
    return resolved


def _tables() -> Traversable:
    return resources.files("node.lab.study") / "tables"


def _names(folder: Traversable) -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def _load(folder: Traversable, name: str, what: str) -> Tree:
    if name not in _names(folder):
        raise ConfigError(f"{name}: no such {what}; there are {', '.join(_names(folder))}")
    with resources.as_file(folder / f"{name}.toml") as path:
        return load_toml(path)
