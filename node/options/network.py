"""The options of `isthmus net`."""

from __future__ import annotations

import argparse
from pathlib import Path

from node.epilogs import LIVE, NET
from node.options.common import Commands, add_command, add_key


def add_net(commands: Commands) -> None:
    """`isthmus net` and its commands."""
    net = commands.add_parser(
        "net", help="the emulated network: measure it, or change it during a run", allow_abbrev=False
    )
    _add_net(net.add_subparsers(dest="net_command", required=True, metavar="COMMAND"))


def _add_net(commands: Commands) -> None:
    verify = add_command(
        commands,
        "verify",
        "measure how exact the emulated network is here (0: exact, 1: not)",
        NET,
        takes_settings=True,
    )
    verify.add_argument(
        "--profile", action="append", metavar="PROFILE", help="a built-in profile or a TOML file; several may be given"
    )
    verify.add_argument(
        "--suite", default="", help="a table of measurements instead: kernel, fairness, nic, rings, dilation"
    )
    verify.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    verify.add_argument("--json", action="store_true", help="print exactly one JSON object")
    verify.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to this file as well")

    tune = _live(commands, "set", "change a rate or a latency during a run")
    tune.add_argument("--rate", help="the rate from now on, such as '50 Mbit/s', or unlimited")
    tune.add_argument("--latency", help="the one-way latency from now on, such as '80 ms'")
    where = tune.add_mutually_exclusive_group()
    where.add_argument("--node", help="change one node's line, up and down: its name, a pattern, or a site's name")
    where.add_argument("--pair", nargs=2, metavar=("A", "B"), help="change the links between these two, both ways")
    where.add_argument("--all", action="store_true", help="change all links and lines, which is the default")
    cut = _live(commands, "cut", "let nothing pass between two nodes during a run")
    cut.add_argument("ends", nargs=2, metavar="NODE", help="a node's name, a pattern, or a site's name")
    heal = _live(commands, "heal", "undo one cut, or all cuts if no nodes are named")
    heal.add_argument("ends", nargs="*", metavar="NODE", help="the two nodes that were cut from each other")
    _live(commands, "reset", "go back to the network that the run's profile states")
    _live(commands, "show", "the network of a run: its state, its past changes, and those to come")


def _live(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, text, LIVE)
    parser.add_argument(
        "--coordinator",
        required=True,
        metavar="ADDRESS",
        help="tcp://HOST:PORT, or the folder of a run on this machine",
    )
    add_key(parser)
    return parser
