"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from node.config import OPERATOR_VARIABLE, TOKEN_VARIABLE

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What commands are added to; argparse has no public name for it."""

CONFIG_HELP = "a TOML file, or the name of one in configs/, such as demo"


def add_command(
    commands: Commands,
    name: str,
    text: str,
    epilog: str = "",
    *,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    """One command; `text` is its line in the list of commands."""
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(takes_settings=takes_settings)
    return command


def add_config(parser: argparse.ArgumentParser) -> None:
    """The config, and what else says what a run is to be."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    add_preset(parser)
    add_print_config(parser)


def add_preset(parser: argparse.ArgumentParser) -> None:
    """`--preset`."""
    parser.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="settings with a purpose, laid under those of the file; `isthmus settings` lists the presets",
    )


def add_print_config(parser: argparse.ArgumentParser) -> None:
    """`--print-config`."""
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as TOML, without secrets, and exit"
    )


def add_key(parser: argparse.ArgumentParser) -> None:
    """`--key`, of commands that speak to a running run."""
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the operator's key (default: the one in the run's folder while the run goes on, or else the one that "
        f"{OPERATOR_VARIABLE} and {TOKEN_VARIABLE} give)",
    )
