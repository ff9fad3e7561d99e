"""Presets: named sets of settings, each a TOML file here that begins with a comment on what it is for.

A preset lies over the defaults and under the config file and the command line. It states every setting that its purpose
depends on, also where that is the default, so that it keeps its meaning when a default changes.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from typing import NamedTuple

from netem.config import Tree
from netem.errors import ConfigError


class Preset(NamedTuple):
    """One preset: what it is for, and what it sets."""

    name: str
    purpose: str
    tree: Tree


def preset_names() -> list[str]:
    """Every preset there is."""
    folder = resources.files("node.config.presets")
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_preset(name: str, key: str = "--preset") -> Preset:
    """The preset called `name`. Raises `ConfigError`, which names `key`, where there is none."""
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} {name!r}: no such preset; there are {', '.join(names)}{hint}")
    text = (resources.files("node.config.presets") / f"{name}.toml").read_text(encoding="utf-8")
    comment = [line for line in text.partition("\n[")[0].splitlines() if line.startswith("#")]
    return Preset(name, " ".join(line.removeprefix("#").strip() for line in comment), tomllib.loads(text))
