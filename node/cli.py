"""The command line: `isthmus run | coordinator | node | eval | export | report | study | plan | tunnel | net | …`.

What can be said is in `node.options`, what a command does in `node.commands`; this joins the two. Exit codes: 0 done,
1 the run failed, 2 a mistake that the user can mend, 130 interrupted. Mistakes are one line, without a traceback.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence

from netem.children import end_with_parent
from netem.config import describe
from netem.errors import ConfigError, IsthmusError
from node.config import TOKEN_VARIABLE, Config, load_config
from node.options import parser

FINAL_EVALUATION_TOKENS = 1 << 16
"""Held-out tokens that `isthmus run` evaluates its last checkpoint on; `isthmus eval` takes all of them."""

LEAKS = "the chunk's own mean tells its early tokens of later ones (compress.own): not to be compared with other losses"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    end_with_parent()
    atexit.register(gc.freeze)  # or the collector would walk all of torch's objects several times at the exit
    options, rest = parser().parse_known_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        if options.command not in _CONFIGURED and rest:
            raise ConfigError(f"{' '.join(rest)}: not understood; see isthmus {options.command} --help")
        return _COMMANDS[options.command](options, rest) or 0
    except ConfigError as error:
        print(f"isthmus {options.command}: error: {error}", file=sys.stderr)
        return 2
    except IsthmusError as error:
        print(f"isthmus {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"isthmus {options.command}: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    from coordinator.records.rates import untrusted
    from node.commands.evaluate import evaluate
    from node.commands.run import run_swarm
    from node.watch.report import draw_report, read_run

    config = run_swarm(_load(options, overrides))
    folder = config.run.folder
    print(f"report:      {draw_report(folder)}")
    result = evaluate(folder, batches=max(1, FINAL_EVALUATION_TOKENS // (config.model.context * config.train.batch)))
    print(f"held-out:    loss {result.loss:.4f}, perplexity {result.perplexity:.1f} over {result.tokens} tokens")
    if result.leaks:
        print(f"leaks:       {LEAKS}")
    if late := untrusted(read_run(folder).records):
        print(late.replace(": ", ":   ", 1))
    print(f"everything:  {folder}")


def _coordinator(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.coordinator import run_coordinator

    run_coordinator(_load(options, overrides))


def _node(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.node import run_node

    config = _load(options, overrides)
    run_node(config, options.join, options.bind, options.advertise, options.name, options.rank)


def _eval(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.evaluate import evaluate

    if options.batches < 0:
        raise ConfigError(f"--batches {options.batches}: expected 0 (all) or more")
    result = evaluate(options.checkpoint, options.batches, overrides)
    print(f"step {result.step}: held-out loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}")
    print(f"over {result.tokens} tokens that were never trained on")
    if result.leaks:
        print(f"leaks:       {LEAKS}")


def _export(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.export import export

    found = export(options.checkpoint, options.folder)
    print(f"written:     {options.folder}: {', '.join(found.files)}")
    print(f"model:       a plain Llama of {found.parameters:,} parameters in float32, after step {found.step}")
    if found.note:
        print(f"note:        {found.note}")
    print(f'load it:     transformers.AutoModelForCausalLM.from_pretrained("{options.folder}")')


def _report(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.watch.report import draw_comparison, draw_report

    if options.out is None and len(options.runs) > 1:
        raise ConfigError("--out: several runs go into one picture; give the file to write, such as --out runs.png")
    if options.out is None:
        print(draw_report(options.runs[0]))
    else:
        print(draw_comparison(options.runs, options.out))


def _study(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.study import Wish, run_study, show_checkpoint, show_studies

    if options.checkpoint is not None:
        if options.name != "spectrum" or overrides:
            raise ConfigError("--checkpoint: goes with `isthmus study spectrum`, and with nothing else")
        show_checkpoint(options.checkpoint)
    elif not options.name:
        if overrides:
            raise ConfigError(f"{' '.join(overrides)}: name a study; `isthmus study` lists them")
        show_studies()
    else:
        wish = Wish(options.name, options.base, options.seeds, options.jobs, options.out, tuple(overrides))
        print(f"study:       {run_study(wish)}")


def _net(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.net_command != "verify":
        return _change_net(options, overrides)
    from node.commands.net import Wish, verify

    wish = Wish(
        tuple(options.profile or ()), options.suite, options.quick, options.json, options.markdown, tuple(overrides)
    )
    return verify(wish)


def _change_net(options: argparse.Namespace, rest: list[str]) -> int:
    from netem.changes import ChangeConfig
    from node.commands.change import change_network

    if rest:
        raise ConfigError(f"{' '.join(rest)}: not understood; see isthmus net {options.net_command} --help")
    ends = tuple(getattr(options, "ends", ()))
    if len(ends) not in (0, 2):
        raise ConfigError(f"heal {' '.join(ends)}: expected two nodes, or none to heal all")
    change = None
    if options.net_command == "set":
        if options.rate is None and options.latency is None:
            raise ConfigError("set: expected --rate or --latency, or both")
        pair = tuple(options.pair) if options.pair else None
        change = ChangeConfig(rate=options.rate, latency=options.latency, node=options.node, pair=pair)
    elif options.net_command == "cut":
        change = ChangeConfig(cut=ends)
    elif options.net_command == "heal":
        change = ChangeConfig(heal=ends or True)
    elif options.net_command == "reset":
        change = ChangeConfig(reset=True)
    token = options.token if options.token is not None else os.environ.get(TOKEN_VARIABLE, "")
    return change_network(options.coordinator, token, change)


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.plan import MFU, Question, check_against, plan_config

    if options.validate:
        if options.config is not None or overrides:
            raise ConfigError("--validate: takes folders of runs, and their configs with them; give it nothing else")
        check_against(options.validate)
        return
    if options.config is None:
        raise ConfigError("CONFIG: give a TOML file, such as configs/demo.toml, or --validate with folders of runs")
    if options.fit and options.mfu is not None:
        raise ConfigError("--mfu: a fit to runs takes its place; give one of the two")
    given = [] if options.nodes is None else [f"--coordinator.nodes={options.nodes}"]
    given += [] if options.net is None else [f"--net.profile={options.net}"]
    # A plan listens nowhere, so it needs no token.
    config = _load(options, [*given, "--coordinator.address=tcp://127.0.0.1:0", *overrides])
    mfu = MFU if options.mfu is None else options.mfu
    contexts, runs = tuple(options.contexts), tuple(options.fit)
    plan_config(config, Question(options.device, mfu, runs, contexts, options.json, options.png))


def _tunnel(options: argparse.Namespace, overrides: list[str]) -> int:
    from node.commands.tunnel import Wish, tunnel

    given = [] if options.nodes is None else [f"--coordinator.nodes={options.nodes}"]
    given += [] if options.net is None else [f"--net.profile={options.net}"]
    wish = Wish(
        target=options.target,
        device=options.device,
        mfu=options.mfu,
        small=options.small,
        modes=tuple(options.mode or ()),
        steps=options.steps,
        run=options.run,
        out=options.out,
        overrides=(*given, *overrides),
    )
    return tunnel(wish)


def _show_settings(options: argparse.Namespace, _rest: list[str]) -> None:
    keys = [key for key in describe(Config) if key.path.startswith(f"{options.section}." if options.section else "")]
    if not keys:
        sections = sorted({key.path.partition(".")[0] for key in describe(Config)})
        raise ConfigError(f"{options.section}: no such section; there are {', '.join(sections)}")
    width = max(len(key.path) for key in keys)
    section = ""
    for key in keys:
        if key.path.partition(".")[0] != section:
            section = key.path.partition(".")[0]
            print(f"\n[{section}]")
        print(f"  {key.path:{width}}  {key.default or '(none)'}")
        print(f"  {'':{width}}  {key.description}  ({key.type_name})")


def _load(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of the file and the command line; the token may come from the environment, out of sight of `ps`."""
    token = os.environ.get(TOKEN_VARIABLE)
    secret = [f"--coordinator.token={token}"] if token else []
    return load_config(options.config, [*overrides, *secret])


# A command that has an answer of its own (`net verify`) returns its exit code.
_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int | None]] = {
    "run": _run,
    "coordinator": _coordinator,
    "node": _node,
    "eval": _eval,
    "export": _export,
    "report": _report,
    "study": _study,
    "plan": _plan,
    "tunnel": _tunnel,
    "net": _net,
    "settings": _show_settings,
}
_CONFIGURED = ("run", "coordinator", "node", "eval", "study", "net", "plan", "tunnel")


if __name__ == "__main__":
    sys.exit(main())
