"""The commands of `isthmus`, their options and their help, and how a command line is split into options and settings.

No more than `argparse` is imported here, so that help and mistakes are answered at once: what the commands need is
imported by those that run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netem.errors import ConfigError
from node.config import TOKEN_VARIABLE
from node.epilogs import BENCH, COMPLETION, EVAL, EXPERIMENT, LIVE, NET, OVERVIEW, PLAN, SETTINGS, TRACE, TUNNEL

_SETTING = re.compile(r"--[^=.\s-][^=.\s]*\.[^=]*(?P<value>=.*)?", re.DOTALL)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command line, and the settings in it (`--train.steps 5`), which may stand anywhere.

    Raises `ConfigError` for words that are neither. argparse ends the process itself for its own mistakes and for help.
    """
    words, settings = split_settings(arguments)
    options, rest = parser().parse_known_args(words)
    command = " ".join(filter(None, (options.command, getattr(options, "net_command", ""))))
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

    run = _command(
        commands, "run", "a whole run on this machine: a coordinator and its nodes", SETTINGS, takes_settings=True
    )
    _add_config(run)

    lead = _command(
        commands,
        "coordinator",
        "the coordinator of a run: rendezvous, barriers, records",
        SETTINGS,
        takes_settings=True,
    )
    _add_config(lead)

    _add_node(
        _command(
            commands,
            "node",
            "one worker: joins a coordinator and trains until the run ends",
            SETTINGS,
            takes_settings=True,
        )
    )

    evaluation = _command(commands, "eval", "the held-out loss of a checkpoint", EVAL, takes_settings=True)
    evaluation.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    evaluation.add_argument(
        "--batches", type=int, default=0, help="the number of held-out batches (default: 0, which is all of them)"
    )
    _add_print_config(evaluation)

    export = _command(commands, "export", "a checkpoint as a Hugging Face folder: a plain Llama and its tokenizer")
    export.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    export.add_argument("folder", type=Path, help="the folder to write; it must not exist yet, or be empty")

    report = _command(commands, "report", "a picture of one run, or of several together")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as outputs/demo")
    report.add_argument("--out", type=Path, help="the PNG to write (default: report.png in the run's folder)")

    trace = _command(commands, "trace", "one step of a run, node by node, as a file for Perfetto's viewer", TRACE)
    trace.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as outputs/demo")
    trace.add_argument("--step", type=int, required=True, help="the step; the run must have recorded it")
    trace.add_argument("--out", type=Path, help="the file to write (default: trace/step-N.json in the run's folder)")

    _add_study(
        _command(
            commands,
            "study",
            "compare settings over seeds, on this machine; no name: the list",
            SETTINGS,
            takes_settings=True,
        )
    )

    net = commands.add_parser(
        "net", help="the emulated network: measure it, or change it during a run", allow_abbrev=False
    )
    _add_net(net.add_subparsers(dest="net_command", required=True, metavar="COMMAND"))

    _add_tunnel(
        _command(commands, "tunnel", "a small run that behaves like a large one elsewhere", TUNNEL, takes_settings=True)
    )

    _add_bench(
        _command(
            commands,
            "bench",
            "measure Isthmus and its peers on one wire, shaped by the kernel (Linux, root)",
            BENCH,
            takes_settings=True,
        )
    )

    _add_experiment(
        _command(
            commands,
            "experiment",
            "train a named set of runs in the wind tunnel, and draw them",
            EXPERIMENT,
            takes_settings=True,
        )
    )

    _add_plan(
        _command(
            commands,
            "plan",
            "how long a step would take on other machines; runs nothing",
            PLAN,
            takes_settings=True,
        )
    )

    settings = _command(commands, "settings", "the presets, and every setting with its default and meaning")
    settings.add_argument("section", nargs="?", default="", help="one section: run, model, compress, train, …")
    settings.add_argument("--preset", default="", metavar="NAME", help="show what this preset sets, in place of all")

    completion = _command(commands, "completion", "a script that makes a shell complete what you type", COMPLETION)
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


def _add_node(node: argparse.ArgumentParser) -> None:
    _add_config(node)
    node.add_argument("--join", default="", metavar="ADDRESS", help="the coordinator's address: tcp://HOST:PORT")
    node.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ADDRESS",
        help="where peers reach this node: tcp://INTERFACE:PORT; port 0 takes a free one (default: %(default)s)",
    )
    node.add_argument(
        "--advertise", default="", metavar="HOST", help="the host name that peers are told (default: that of --bind)"
    )
    node.add_argument(
        "--name", default="", help="the node's name (default: node-RANK, or its host's name and some digits)"
    )
    node.add_argument("--rank", type=int, default=-1, help="the rank that the node asks for (default: any)")


def _add_study(study: argparse.ArgumentParser) -> None:
    study.add_argument("name", nargs="?", default="", metavar="NAME", help="a study, such as control")
    study.add_argument("--base", default="", help="another base for its arms, such as novels-gpt2")
    study.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    study.add_argument("--jobs", type=int, default=0, help="runs at the same time (default: 0, the number of cores)")
    study.add_argument("--out", type=Path, default=Path("docs/study"), help="folder to write to (default: %(default)s)")
    study.add_argument(
        "--redraw", action="store_true", help="run nothing: make pages and pictures anew from the .jsonl files in --out"
    )
    study.add_argument(
        "--checkpoint", type=Path, help="with `spectrum` only: a Hugging Face folder whose weights are examined instead"
    )
    _add_preset(study)
    _add_print_config(study)


def _add_net(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = _command(
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


def _live(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    parser = _command(commands, name, text, LIVE)
    parser.add_argument(
        "--coordinator",
        required=True,
        metavar="ADDRESS",
        help="tcp://HOST:PORT, or the folder of a run on this machine",
    )
    parser.add_argument(
        "--token",
        help=f"the run's secret (default: the one in the run's folder, or else the environment's {TOKEN_VARIABLE})",
    )
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="a TOML file, such as configs/demo.toml")
    _add_preset(plan)
    _add_print_config(plan)
    plan.add_argument("--nodes", type=int, help="the number of nodes, in place of coordinator.nodes")
    plan.add_argument("--net", metavar="PROFILE", help="a network, in place of net.profile")
    plan.add_argument(
        "--device",
        default="",
        help="the device of each node: a100, h100, 4090, cpu, …; or one for each node, as a100,4090 (default: a100 "
        "where run.device is cuda, else cpu)",
    )
    plan.add_argument("--mfu", type=float, help="share of the device's peak that a step reaches (default: 0.4)")
    plan.add_argument("--contexts", type=int, nargs="+", default=[], metavar="TOKENS", help="other contexts to compare")
    plan.add_argument(
        "--fit",
        type=Path,
        nargs="+",
        default=[],
        metavar="METRICS",
        help="runs (metrics.jsonl, or their folders) from which compute times are taken",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    plan.add_argument("--png", type=Path, help="draw tokens/s over bandwidth and nodes into this file")
    plan.add_argument(
        "--validate",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="test the planner: fit it to half of these runs and predict the others",
    )


def _add_tunnel(tunnel: argparse.ArgumentParser) -> None:
    tunnel.add_argument("--target", required=True, metavar="CONFIG", help="a config, or its name in configs/")
    _add_preset(tunnel)
    _add_print_config(tunnel)
    tunnel.add_argument("--nodes", type=int, help="the number of nodes, of the target and of the tunnel")
    tunnel.add_argument("--net", metavar="PROFILE", help="the target's network, in place of net.profile")
    tunnel.add_argument("--device", default="a100", help="the device of each of the target's nodes (%(default)s)")
    tunnel.add_argument(
        "--mfu", type=float, default=0.4, help="share of the device's peak that a step reaches (default: %(default)s)"
    )
    tunnel.add_argument(
        "--small",
        type=Path,
        metavar="CONFIG",
        help="take the small model's widths, chunk length and data from this config (default: built in)",
    )
    tunnel.add_argument(
        "--mode",
        action="append",
        metavar="MODE",
        help="only this mode: centralized, compressed or uncompressed; several may be given",
    )
    tunnel.add_argument("--run", action="store_true", help="also run each mode, and check that its ratios are right")
    tunnel.add_argument("--steps", type=int, default=12, help="steps of each run (default: %(default)s)")
    tunnel.add_argument("--out", type=Path, default=Path("outputs/tunnel"), help="folder to write to (%(default)s)")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "config",
        type=Path,
        nargs="?",
        default=Path("configs/figure.toml"),
        metavar="CONFIG",
        help="the model and its data (default: %(default)s)",
    )
    bench.add_argument("--nodes", type=int, default=4, help="the number of nodes (default: %(default)s)")
    bench.add_argument(
        "--rate", default="300 Mbit/s", help="the rate of each node's NIC, up and down (default: %(default)s)"
    )
    bench.add_argument("--quick", action="store_true", help="fewer arms and repeats, and no scaling: about 3 minutes")
    bench.add_argument("--out", type=Path, default=Path("docs/bench"), help="folder to write to (default: %(default)s)")


def _add_experiment(experiment: argparse.ArgumentParser) -> None:
    experiment.add_argument("name", choices=("figure2",), help="the experiment")
    experiment.add_argument("--steps", type=int, default=60, help="steps of each run (default: %(default)s)")
    experiment.add_argument("--arm", action="append", metavar="ARM", help="only this arm; several may be given")
    experiment.add_argument(
        "--runs",
        type=Path,
        default=Path("outputs/figure2"),
        help="folder of the runs, kept between calls (%(default)s)",
    )
    experiment.add_argument("--png", type=Path, default=Path("docs/figure.png"), help="the picture (%(default)s)")
    experiment.add_argument("--page", type=Path, default=Path("docs/bench/figure2.md"), help="the page (%(default)s)")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    epilog: str = "",
    *,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
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


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file, such as configs/demo.toml")
    _add_preset(parser)
    _add_print_config(parser)


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="settings with a purpose, laid under those of the file; `isthmus settings` lists the presets",
    )


def _add_print_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as TOML, without secrets, and exit"
    )
