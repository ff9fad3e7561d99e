"""The options of the commands that do the job (run, coordinator, node), and that look at a run or use its results."""

from __future__ import annotations

import argparse
from pathlib import Path

from node.epilogs import DASHBOARD, DATA, DOCTOR, EVAL, GENERATE, KEYS, LAUNCH, SETTINGS, TRACE, WATCH
from node.options.common import Commands, add_command, add_config, add_key, add_preset, add_print_config


def add_training(commands: Commands) -> None:
    """The commands that train."""
    run = add_command(
        commands, "run", "a whole run on this machine: a coordinator and its nodes", SETTINGS, takes_settings=True
    )
    add_config(run)
    _add_page(run)

    lead = add_command(
        commands,
        "coordinator",
        "the coordinator of a run: rendezvous, barriers, records",
        SETTINGS,
        takes_settings=True,
    )
    add_config(lead)
    _add_page(lead)

    _add_node(
        add_command(
            commands,
            "node",
            "one worker: joins a coordinator and trains until the run ends",
            SETTINGS,
            takes_settings=True,
        )
    )

    launch = add_command(
        commands, "launch", "a node of a run that torchrun, Slurm or Kubernetes starts", LAUNCH, takes_settings=True
    )
    add_config(launch)
    launch.add_argument("--port", type=int, default=7070, help="the coordinator's port at MASTER_ADDR (%(default)s)")
    launch.add_argument(
        "--interface", default="", metavar="NAME", help="where this process listens (default: the way to MASTER_ADDR)"
    )


def add_data(commands: Commands) -> None:
    """`isthmus data` and its commands."""
    data = commands.add_parser("data", help="the tokens of a corpus, made ahead of a run", allow_abbrev=False)
    parts = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    text = "tokenise the corpus of a config now, so that no node has to when the run begins"
    add_config(add_command(parts, "prepare", text, DATA, takes_settings=True))


def add_keys(commands: Commands) -> None:
    """`isthmus keys`."""
    keys = add_command(commands, "keys", "make keys for a run: for the coordinator, the operator, and each node", KEYS)
    keys.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write; it must be new or empty")
    keys.add_argument("--nodes", type=int, default=0, help="invitations to make, for node-0 and so on (default: 0)")
    keys.add_argument("--name", action="append", metavar="NAME", help="another invitation; several may be given")


def add_doctor(commands: Commands) -> None:
    """`isthmus doctor`."""
    text = (
        "machines that want to train together: what is wrong with them and the ways between them (0: nothing, 1: see)"
    )
    doctor = add_command(commands, "doctor", text, DOCTOR, takes_settings=True)
    doctor.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="the run's TOML file, to plan the run on this network"
    )
    add_preset(doctor)
    where = doctor.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--listen", default="", metavar="ADDRESS", help="on one machine: tcp://INTERFACE:PORT, as coordinator.address"
    )
    where.add_argument("--join", default="", metavar="ADDRESS", help="on the others: the first one's tcp://HOST:PORT")
    doctor.add_argument("--nodes", type=int, help="with --listen: the number of machines, this one among them")
    doctor.add_argument(
        "--bind",
        default="",
        metavar="ADDRESS",
        help="where the others reach this machine: tcp://INTERFACE:PORT (default: the way to the first machine)",
    )
    doctor.add_argument(
        "--advertise", default="", metavar="HOST[:PORT]", help="where the others are told to reach it, behind NAT"
    )
    doctor.add_argument("--name", default="", help="this machine's name (default: its host's)")
    doctor.add_argument(
        "--wait",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="with --listen: wait so long (default: %(default)s)",
    )
    doctor.add_argument("--out", type=Path, metavar="FILE", help="write the network's profile to this file")


def add_results(commands: Commands) -> None:
    """The commands that look at a run, or take something out of it."""
    evaluation = add_command(commands, "eval", "the held-out loss of a checkpoint", EVAL, takes_settings=True)
    evaluation.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    evaluation.add_argument(
        "--batches", type=int, default=0, help="the number of held-out batches (default: 0, which is all of them)"
    )
    add_print_config(evaluation)

    export = add_command(commands, "export", "a checkpoint as a Hugging Face folder: a plain Llama and its tokenizer")
    export.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    export.add_argument("folder", type=Path, help="the folder to write; it must not exist yet, or be empty")

    text = add_command(commands, "generate", "text from a checkpoint, or from an export", GENERATE, takes_settings=True)
    text.add_argument("source", type=Path, help="outputs/RUN, a checkpoint in it, or a Hugging Face folder of a Llama")
    text.add_argument("--prompt", default="", help="the text to go on with (default: none)")
    text.add_argument("--tokens", type=int, default=64, help="the number of tokens at most (default: %(default)s)")
    text.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    text.add_argument("--seed", type=int, default=0, help="another seed gives another text (default: %(default)s)")

    report = add_command(commands, "report", "a picture of one run, or of several together")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as outputs/demo")
    report.add_argument("--out", type=Path, help="the PNG to write (default: report.png in the run's folder)")

    page = add_command(commands, "dashboard", "the live page of a run, for a browser", DASHBOARD)
    page.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as outputs/demo")
    page.add_argument(
        "--bind", default="127.0.0.1:7080", metavar="HOST:PORT", help="where the page is served (default: %(default)s)"
    )
    page.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="another name under which browsers reach the page"
    )

    watch = add_command(
        commands, "watch", "the live view of a run, from any machine that reaches its coordinator", WATCH
    )
    watch.add_argument("run", metavar="RUN", help="the coordinator's address, tcp://HOST:PORT, or the run's folder")
    add_key(watch)

    trace = add_command(commands, "trace", "one step of a run, node by node, as a file for Perfetto's viewer", TRACE)
    trace.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as outputs/demo")
    trace.add_argument("--step", type=int, required=True, help="the step; the run must have recorded it")
    trace.add_argument("--out", type=Path, help="the file to write (default: trace/step-N.json in the run's folder)")


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dashboard", default="", metavar="HOST:PORT", help="serve the run's live page there, such as 127.0.0.1:7080"
    )
    parser.add_argument(
        "--dashboard-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which browsers reach the page",
    )


def _add_node(node: argparse.ArgumentParser) -> None:
    add_config(node)
    node.add_argument("--join", default="", metavar="ADDRESS", help="the coordinator's address: tcp://HOST:PORT")
    node.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ADDRESS",
        help="where peers reach this node: tcp://INTERFACE:PORT; port 0 takes a free one (default: %(default)s)",
    )
    node.add_argument(
        "--advertise",
        default="",
        metavar="HOST[:PORT]",
        help="where peers are told to reach this node, behind NAT or in a container (default: as bound)",
    )
    node.add_argument(
        "--name", default="", help="the node's name (default: node-RANK, or its host's name and some digits)"
    )
    node.add_argument("--rank", type=int, default=-1, help="the rank that the node asks for (default: any)")
