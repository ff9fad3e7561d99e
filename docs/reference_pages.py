"""The pages docs/reference/settings.rst and commands.rst, written from the code."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from netem.config import Key, describe
from node.config import Config
from node.config.presets import load_preset, preset_names
from node.options import parser

WIDTH = 100


def write_pages(folder: Path) -> None:
    """Write both, where they have changed: Sphinx reads again only what has."""
    for name, text in (("settings.rst", settings_page()), ("commands.rst", commands_page())):
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def settings_page() -> str:
    """Every setting with its type, default and meaning, a section each; and the presets."""
    lines = [
        *_heading("Settings", "="),
        "A run has one config: a TOML file, with a table for each section below. Any setting can also be given on the",
        "command line, as ``--section.key VALUE``. What comes later in this order takes precedence: defaults, preset,",
        "file, command line. ``isthmus settings`` prints the same.",
        "",
        *_heading("Presets", "-"),
    ]
    for name in preset_names():
        lines += [f"``{name}``", *_indented(_plain(" ".join(load_preset(name).purpose.split()))), ""]
    for section, keys in groupby(describe(Config), key=lambda key: key.path.partition(".")[0]):
        lines += _heading(f"[{section}]", "-")
        for key in keys:
            lines += [f"``{key.path}``", *_indented(_about(key)), ""]
    return "\n".join(lines)


def commands_page() -> str:
    """The help of every command."""
    lines = [*_heading("Commands", "="), "Exit codes: 0 done, 1 the run failed, 2 a mistake that you can mend.", ""]
    for command in _commands(parser()):
        lines += [*_heading(command.prog, "-"), "::", "", *_indented(_help(command), wrap=False), ""]
    return "\n".join(lines)


def _about(key: Key) -> str:
    choices = f" One of {', '.join(map(str, key.choices))}." if key.choices else ""
    return f"{_plain(key.description + choices)} *{key.type_name}, default* ``{key.default or 'none'}``"


def _commands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _commands(command)


def _help(command: argparse.ArgumentParser) -> str:
    kind = command.formatter_class
    command.formatter_class = lambda prog: kind(prog, width=WIDTH)  # type: ignore[assignment]
    return command.format_help()


def _heading(text: str, mark: str) -> list[str]:
    return [text, mark * len(text), ""]


def _indented(text: str, wrap: bool = True) -> list[str]:
    lines = textwrap.wrap(text, WIDTH) if wrap else text.splitlines()
    return [f"    {line}".rstrip() for line in lines]


def _plain(text: str) -> str:
    """Text in which no character has a meaning of its own."""
    return re.sub(r"([\\*`|_])", r"\\\1", text)
