"""`isthmus completion`: a script for the user's shell, made by shtab from the parser and the config's keys."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shtab

from coordinator.config import SECRETS
from netem.config import describe
from node.config import Config
from node.config.presets import preset_names


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script. Settings are options here, so that `--train.st` is completed to `--train.steps`."""
    for command in _commands(parser):
        for action in command._actions:
            if action.dest == "preset":
                action.choices = preset_names()
            elif action.type is Path:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  (argparse does not know the attribute)
        if command.get_default("takes_settings"):
            _add_settings(command)
    return shtab.complete(parser, shell)


def _add_settings(command: argparse.ArgumentParser) -> None:
    network_only = command.prog.endswith("net verify")
    for key in describe(Config):
        if key.path in SECRETS or (network_only and not key.path.startswith("net.")):
            continue
        options: dict[str, Any] = {"help": key.description.replace("%", "%%"), "metavar": "VALUE"}
        if key.choices:
            options["choices"] = key.choices
        command.add_argument(f"--{key.path}", **options)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command that has no commands of its own."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser
    for action in nested:
        for command in action.choices.values():
            yield from _commands(command)
