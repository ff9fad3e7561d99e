"""What can be said to `isthmus`: its commands, their options and their help. No more than `argparse`, so that it is
there at once: what the commands need is imported by those that run."""

from __future__ import annotations

import argparse
from pathlib import Path

from node.config import TOKEN_VARIABLE

_SETTINGS = """\
Every setting of the config can be given on the command line, in place of the file's:
  --train.steps 100  --compress.mode dense  --net.profile datacenter-100gbps
`isthmus settings` lists them all, with their defaults; `isthmus settings train` those of one section.
"""

_NET = """\
Settings of the network can be given in place of the profile's:
  isthmus net verify --profile datacenter-100gbps --net.dilation 50
As root on Linux the same transfers are made under the kernel's token bucket (tc-tbf), for comparison.
"""

_LIVE = f"""\
  export {TOKEN_VARIABLE}=…                                          the run's secret, before it is started
  isthmus run configs/demo.toml
  isthmus net set --coordinator outputs/demo --rate '50 Mbit/s'
  isthmus net set --coordinator outputs/demo --latency '80 ms' --pair node-0 node-1
  isthmus net cut node-0 'node-[12]' --coordinator outputs/demo
  isthmus net heal --coordinator outputs/demo
Nothing in flight is lost. A cut that lasts shorter than nodes may be silent only delays the run.
"""

_TUNNEL = """\
Settings change the target; the small model has its layers, chunks, ownership and [compress]:
  isthmus tunnel --target paper-800m --nodes 8 --net internet-300mbps --compress.dense_last_layers 0 --run
Exit code 1: a run missed the target's communication over compute, latency or averaging by more than 10 %.
"""

_OVERVIEW = """\
examples:
  isthmus run configs/demo.toml                            a coordinator and four nodes on this machine
  isthmus run configs/tiny.toml --coordinator.nodes 2      the same in small, on two nodes
  isthmus eval outputs/demo                                held-out loss of its last checkpoint
  isthmus report outputs/demo outputs/demo-2 --out a.png   two runs in one picture
  isthmus export outputs/demo hf/demo                      the model, as a folder for transformers
  isthmus study control                                    what the far context is worth, and what keeps it
  isthmus plan configs/paper-800m.toml --nodes 8           what a step would take elsewhere; runs nothing
  isthmus tunnel --target paper-800m --net lte --run       the same at the same ratios, in small, run here

on several machines:
  one   $ ISTHMUS_TOKEN=… isthmus coordinator run.toml --coordinator.address tcp://10.0.0.5:7070
  each  $ ISTHMUS_TOKEN=… isthmus node run.toml --join tcp://10.0.0.5:7070 --bind tcp://eth0:0
"""


def parser() -> argparse.ArgumentParser:
    """All commands and their options; `options.command` names the one."""
    isthmus = argparse.ArgumentParser(
        prog="isthmus",
        description="Train long-context language models across narrow links.",
        epilog=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = isthmus.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _command(commands, "run", "a whole run on this machine: a coordinator and its nodes", _SETTINGS)
    _add_config(run)

    lead = _command(commands, "coordinator", "the coordinator of a run: rendezvous, barriers, records", _SETTINGS)
    _add_config(lead)

    node = _command(commands, "node", "one worker: joins a coordinator and trains until the run ends", _SETTINGS)
    _add_config(node)
    node.add_argument("--join", required=True, metavar="ADDRESS", help="the coordinator's address: tcp://HOST:PORT")
    node.add_argument(
        "--bind",
        default="tcp://127.0.0.1:0",
        metavar="ADDRESS",
        help="where peers reach this node: tcp://INTERFACE:PORT; port 0 takes a free one (default: %(default)s)",
    )
    node.add_argument("--advertise", default="", metavar="HOST", help="the host that peers are told (default: bound)")
    node.add_argument(
        "--name", default="", help="what the node is called (default: node-RANK, or its host and some digits)"
    )
    node.add_argument("--rank", type=int, default=-1, help="the rank it would like (default: any)")

    evaluation = _command(commands, "eval", "the held-out loss of a checkpoint", _SETTINGS)
    evaluation.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    evaluation.add_argument(
        "--batches", type=int, default=0, help="how many held-out batches (default: 0, which is all of them)"
    )

    export = _command(commands, "export", "a checkpoint as a Hugging Face folder: a plain Llama and its tokenizer", "")
    export.add_argument("checkpoint", type=Path, help="outputs/RUN, or outputs/RUN/checkpoint/step-N")
    export.add_argument("folder", type=Path, help="the folder to write; it must not exist yet, or be empty")

    report = _command(commands, "report", "a picture of one run, or of several together", "")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as outputs/demo")
    report.add_argument("--out", type=Path, help="the PNG to write (default: report.png in the run's folder)")

    study = _command(commands, "study", "a named table of arms × seeds, run here; without a name: the list", _SETTINGS)
    study.add_argument("name", nargs="?", default="", metavar="NAME", help="a study, such as control")
    study.add_argument("--base", default="", help="another base for its arms, such as novels-gpt2")
    study.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    study.add_argument("--jobs", type=int, default=0, help="runs at once (default: 0, the number of cores)")
    study.add_argument("--out", type=Path, default=Path("docs/study"), help="folder to write to (default: %(default)s)")
    study.add_argument("--checkpoint", type=Path, help="of `spectrum`: a Hugging Face folder to look at instead")

    net = commands.add_parser(
        "net", help="the emulated network: is it true here? changes while a run goes on", allow_abbrev=False
    )
    _add_net(net.add_subparsers(dest="net_command", required=True, metavar="COMMAND"))

    _add_tunnel(_command(commands, "tunnel", "a small run that behaves as a big one would elsewhere", _TUNNEL))

    _add_plan(_command(commands, "plan", "what a step would take on other machines, without running it", _SETTINGS))

    settings = _command(commands, "settings", "every setting, with its default and meaning", "")
    settings.add_argument("section", nargs="?", default="", help="one section: run, model, compress, train, …")
    return isthmus


def _add_net(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = _command(commands, "verify", "measure how true networks are here; exit code 0: true, 1: untrusted", _NET)
    verify.add_argument(
        "--profile", action="append", metavar="PROFILE", help="a built-in profile or a TOML file; several may be given"
    )
    verify.add_argument(
        "--suite", default="", help="in place of a profile, a table: kernel, fairness, nic, rings, dilation"
    )
    verify.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    verify.add_argument("--json", action="store_true", help="print exactly one JSON object")
    verify.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")

    tune = _live(commands, "set", "another rate or latency, while a run goes on")
    tune.add_argument("--rate", help="the rate from now on, such as '50 Mbit/s', or unlimited")
    tune.add_argument("--latency", help="the one-way latency from now on, such as '80 ms'")
    whose = tune.add_mutually_exclusive_group()
    whose.add_argument("--node", help="of one node's line, up and down: its name, a pattern, or a site's name")
    whose.add_argument("--pair", nargs=2, metavar=("A", "B"), help="of the links between two, both ways")
    whose.add_argument("--all", action="store_true", help="of all links and lines, which is the default")
    cut = _live(commands, "cut", "let nothing pass between two nodes, while a run goes on")
    cut.add_argument("ends", nargs=2, metavar="NODE", help="a node's name, a pattern, or a site's name")
    heal = _live(commands, "heal", "take one cut back, or without names all of them")
    heal.add_argument("ends", nargs="*", metavar="NODE", help="the two that were cut")
    _live(commands, "reset", "go back to the network that the run's profile states")
    _live(commands, "show", "the network of a run that goes on: what it is, has been, and will be")


def _live(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    parser = _command(commands, name, text, _LIVE)
    parser.add_argument(
        "--coordinator",
        required=True,
        metavar="ADDRESS",
        help="tcp://HOST:PORT, or the folder of a run on this machine",
    )
    parser.add_argument("--token", help=f"the run's secret (default: the environment's {TOKEN_VARIABLE})")
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="a TOML file, such as configs/demo.toml")
    plan.add_argument("--nodes", type=int, help="nodes, in place of coordinator.nodes")
    plan.add_argument("--net", metavar="PROFILE", help="a network, in place of net.profile")
    plan.add_argument(
        "--device", default="a100", help="what each node computes on: a100, h100, 4090, cpu, … (%(default)s)"
    )
    plan.add_argument("--mfu", type=float, help="share of the device's peak that a step reaches (default: 0.4)")
    plan.add_argument("--contexts", type=int, nargs="+", default=[], metavar="TOKENS", help="other contexts to compare")
    plan.add_argument(
        "--fit",
        type=Path,
        nargs="+",
        default=[],
        metavar="METRICS",
        help="runs (metrics.jsonl, or their folders) to fit",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object in place of text")
    plan.add_argument("--png", type=Path, help="draw tokens/s over bandwidth and nodes into this file")
    plan.add_argument(
        "--validate",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="fit to half of these runs, predict the rest",
    )


def _add_tunnel(tunnel: argparse.ArgumentParser) -> None:
    tunnel.add_argument("--target", required=True, metavar="CONFIG", help="a config, or its name in configs/")
    tunnel.add_argument("--nodes", type=int, help="nodes of the target, and of the tunnel")
    tunnel.add_argument("--net", metavar="PROFILE", help="the target's network, in place of net.profile")
    tunnel.add_argument("--device", default="a100", help="what each node of the target computes on (%(default)s)")
    tunnel.add_argument(
        "--mfu", type=float, default=0.4, help="share of the device's peak that a step reaches (default: %(default)s)"
    )
    tunnel.add_argument(
        "--small", type=Path, metavar="CONFIG", help="take widths, chunk length and data from here (default: built in)"
    )
    tunnel.add_argument(
        "--mode",
        action="append",
        metavar="MODE",
        help="only centralized, compressed or uncompressed; several may be given",
    )
    tunnel.add_argument("--run", action="store_true", help="run each mode, and check the numbers that it had")
    tunnel.add_argument("--steps", type=int, default=12, help="steps of each run (default: %(default)s)")
    tunnel.add_argument("--out", type=Path, default=Path("outputs/tunnel"), help="folder to write to (%(default)s)")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file, such as configs/demo.toml")
