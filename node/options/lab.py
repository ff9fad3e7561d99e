"""The options of the laboratory's commands: study, tunnel, bench, experiment, plan, chaos."""

from __future__ import annotations

import argparse
from pathlib import Path

from node.epilogs import BENCH, CHAOS, EXPERIMENT, PLAN, SETTINGS, TUNNEL
from node.options.common import CONFIG_HELP, Commands, add_command, add_config, add_preset, add_print_config


def add_study(commands: Commands) -> None:
    """`isthmus study`."""
    _add_study(
        add_command(
            commands,
            "study",
            "compare settings over seeds, on this machine; no name: the list",
            SETTINGS,
            takes_settings=True,
        )
    )


def add_questions(commands: Commands) -> None:
    """The commands that ask how fast something is or would be."""
    _add_tunnel(
        add_command(
            commands, "tunnel", "a small run that behaves like a large one elsewhere", TUNNEL, takes_settings=True
        )
    )

    _add_bench(
        add_command(
            commands,
            "bench",
            "measure Isthmus and its peers on one wire, shaped by the kernel (Linux, root)",
            BENCH,
            takes_settings=True,
        )
    )

    _add_experiment(
        add_command(
            commands,
            "experiment",
            "train a named set of runs in the wind tunnel, and draw them",
            EXPERIMENT,
            takes_settings=True,
        )
    )

    _add_plan(
        add_command(
            commands,
            "plan",
            "how long a step would take on other machines; runs nothing",
            PLAN,
            takes_settings=True,
        )
    )


def add_chaos(commands: Commands) -> None:
    """`isthmus chaos`."""
    chaos = add_command(
        commands, "chaos", "a local run, disturbed on purpose, and what it survived", CHAOS, takes_settings=True
    )
    add_config(chaos)
    chaos.add_argument("--seed", type=int, default=0, help="what happens when is drawn from it (default: %(default)s)")
    chaos.add_argument("--minutes", type=float, default=5.0, help="length of the run (default: %(default)g)")
    chaos.add_argument(
        "--gap", type=float, default=20.0, metavar="SECONDS", help="between disturbances, on average (%(default)g)"
    )
    chaos.add_argument(
        "--kind", action="append", default=[], help="only this kind of disturbance; several may be given (default: all)"
    )
    chaos.add_argument("--spare", type=int, default=1, metavar="NODES", help="always leave so many nodes alone (1)")
    chaos.add_argument("--out", type=Path, help="the table to write (default: chaos.md in the run's folder)")


def _add_study(study: argparse.ArgumentParser) -> None:
    study.add_argument("name", nargs="?", default="", metavar="NAME", help="a study, such as control")
    study.add_argument("--base", default="", help="another base for its arms, such as novels-gpt2")
    study.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    study.add_argument("--jobs", type=int, default=0, help="runs at the same time (default: 0, the number of cores)")
    study.add_argument("--out", type=Path, default=Path("docs/study"), help="folder to write to (default: %(default)s)")
    study.add_argument(
        "--extend",
        action="store_true",
        help="keep the runs that the .jsonl file in --out holds, whatever code has made them, and run only the others",
    )
    study.add_argument(
        "--redraw", action="store_true", help="run nothing: make pages and pictures anew from the .jsonl files in --out"
    )
    study.add_argument(
        "--checkpoint", type=Path, help="with `spectrum` only: a Hugging Face folder whose weights are examined instead"
    )
    add_preset(study)
    add_print_config(study)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help=CONFIG_HELP)
    add_preset(plan)
    add_print_config(plan)
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
    tunnel.add_argument("--target", required=True, metavar="CONFIG", help=CONFIG_HELP)
    add_preset(tunnel)
    add_print_config(tunnel)
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
