"""The commands of `isthmus`, their options and their help, and how a command line is split into options and settings.

No more than `argparse` is imported here, so that help and mistakes are answered at once: what the commands need is
imported by those that run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from netem.errors import ConfigError
from node.epilogs import COMPLETION, OVERVIEW
from node.options.common import add_command
from node.options.job import add_data, add_doctor, add_keys, add_results, add_training
from node.options.lab import add_chaos, add_questions, add_study
from node.options.network import add_net

_SETTING = re.compile(r"--[^=.\s-][^=.\s]*\.[^=]*(?P<value>=.*)?", re.DOTALL)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command line, and the settings in it (`--train.steps 5`), which may stand anywhere.

    Raises `ConfigError` for words that are neither. argparse ends the process itself for its own mistakes and for help.
    """
    words, settings = split_settings(arguments)
    options, rest = parser().parse_known_args(words)
    part = getattr(options, "net_command", "") or getattr(options, "data_command", "")
    command = " ".join(filter(None, (options.command, part)))
    if settings and not options.takes_settings:
        rest = [*rest, *settings]
    if rest:
        hint = "; a setting is given as --section.key VALUE" if options.takes_settings else ""
        raise ConfigError(f"{' '.join(rest)}: not understood{hint}; see isthmus {command} --help")
    return options, settings


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that are options or belong to them, and settings: `--a.b VALUE` or `--a.b=VALUE`, wherever they stand."""
    words: list[str] = []
    settings: list[str] = []
    places = iter(arguments)
    for word in places:
        match = _SETTING.fullmatch(word)
        if match is None:
            words.append(word)
            continue
        value = "" if match["value"] else next(places, None)
        if value is None or value.startswith("--"):
            raise ConfigError(f"{word}: a value is missing; write {word} VALUE")
        settings += [word] if match["value"] else [word, value]
    return words, settings


def parser() -> argparse.ArgumentParser:
    """All commands and their options. `options.command` names the command; `takes_settings` tells whether settings of
    the config may be given to it."""
    isthmus = argparse.ArgumentParser(
        prog="isthmus",
        description="Train long-context language models across narrow links.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    isthmus.add_argument("--version", action=_Version, nargs=0, help="print the versions of Isthmus, Python and torch")
    isthmus.set_defaults(takes_settings=False)
    commands = isthmus.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_training(commands)
    add_results(commands)
    add_study(commands)
    add_net(commands)
    add_keys(commands)
    add_data(commands)
    add_doctor(commands)
    add_questions(commands)
    add_chaos(commands)

    settings = add_command(commands, "settings", "the presets, and every setting with its default and meaning")
    settings.add_argument("section", nargs="?", default="", help="one section: run, model, compress, train, …")
    settings.add_argument("--preset", default="", metavar="NAME", help="show what this preset sets, in place of all")

    completion = add_command(commands, "completion", "a script that makes a shell complete what you type", COMPLETION)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell to print the script for")
    return isthmus


class _Version(argparse.Action):
    """Print versions and exit; they are looked up only then."""

    def __call__(self, *_: Any) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"isthmus {version('isthmus')} (Python {platform.python_version()}, torch {version('torch')})")
        except PackageNotFoundError as error:
            print(f"isthmus, not installed as a package ({error})")
        raise SystemExit(0)
