"""The config of a command line: of its preset, its file, its settings and the environment."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from netem.config import flat, load_toml, toml_value
from netem.errors import ConfigError
from node.config import OPERATOR_VARIABLE, TOKEN_VARIABLE, Config, load_config, to_tree
from node.config.presets import load_preset
from node.config.tree import config_file

_SECRET_OPTIONS = {"--coordinator.token": TOKEN_VARIABLE, "--coordinator.operator": OPERATOR_VARIABLE}

log = logging.getLogger("isthmus.config")


def load(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of the preset, the file and the command line; secrets may come from the environment, out of sight of
    `ps`."""
    for word in overrides:
        if word.partition("=")[0] in _SECRET_OPTIONS:
            key = word.partition("=")[0].removeprefix("--")
            raise ConfigError(
                f"{key}: every user of this machine can read a command line; give it in the environment, as "
                f"{_SECRET_OPTIONS[f'--{key}']}"
            )
    given = {"token": os.environ.get(TOKEN_VARIABLE), "operator": os.environ.get(OPERATOR_VARIABLE)}
    secret = [f"--coordinator.{name}={value}" for name, value in given.items() if value]
    config = load_config(options.config, [*overrides, *secret], options.preset)
    if options.preset and options.config:
        _say_overruled(options.preset, config, options.config)
    return config


def _say_overruled(preset: str, config: Config, path: Path) -> None:
    """Log which settings of the preset the file changes: who asks for `exact` should know where it is not."""
    wanted, given, resolved = flat(load_preset(preset).tree), flat(load_toml(config_file(path))), flat(to_tree(config))
    differing = [key for key in wanted if key in given and given[key] == resolved.get(key) != wanted[key]]
    if differing:
        values = ", ".join(f"{key} = {toml_value(given[key])}, not {toml_value(wanted[key])}" for key in differing)
        log.info("preset %s: %s takes precedence with %s", preset, path, values)
