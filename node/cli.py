"""The command line: `isthmus run | coordinator | node | launch | eval | export | report | watch | plan | …`.

`node.options` says what can be typed, and `node.commands` what a command does; this joins the two. Exit codes: 0 done,
1 the run failed, 2 a mistake that the user can mend, 3 a plan does not fit its device, 130 interrupted, 141 nobody
reads the output any more. Mistakes are one line, without a traceback.
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
from netem.errors import ConfigError, IsthmusError
from node.commands.dashboard import PageWish
from node.commands.load import load
from node.commands.questions import bench, chaos, experiment, given, net, plan, plan_config_of, study, tunnel
from node.config import public_toml
from node.options import parse
from node.terminal import make_readable, reader_has_gone

FAILED, MISTAKE, INTERRUPTED, OUTPUT_CLOSED = 1, 2, 130, 141
"""Exit codes; the last two are those that a shell gives for SIGINT and SIGPIPE."""

FINAL_EVALUATION_TOKENS = 1 << 16
"""Held-out tokens that `isthmus run` evaluates its last checkpoint on; `isthmus eval` takes all of them."""

LEAKS = (
    'early tokens of a chunk depend on later ones (compress.own = "projected"): do not compare this loss with others'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    make_readable()
    end_with_parent()
    atexit.register(gc.freeze)  # or the collector would walk all of torch's objects several times at the exit
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        return OUTPUT_CLOSED


def _main(arguments: Sequence[str]) -> int:
    name = " ".join(["isthmus", *[word for word in arguments if word in _COMMANDS][:1]])
    try:
        options, settings = parse(arguments)
        if getattr(options, "print_config", False):
            print(_resolved(options, settings), end="")
            return 0
        return _COMMANDS[options.command](options, settings) or 0
    except ConfigError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return MISTAKE
    except IsthmusError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.run import run_swarm

    config = run_swarm(load(options, overrides), _page(options))
    # These import torch, which takes seconds: the run begins before, and a mistake is said at once.
    from coordinator.records.rates import untrusted
    from node.commands.evaluate import evaluate
    from node.lab.verdict import network_cost, next_steps
    from node.watch.recorded import read_run
    from node.watch.report import draw_report

    folder = config.run.folder
    print(f"report:      {draw_report(folder)}")
    result = evaluate(folder, batches=max(1, FINAL_EVALUATION_TOKENS // (config.model.context * config.train.batch)))
    print(f"held-out:    loss {result.loss:.4f}, perplexity {result.perplexity:.1f} over {result.tokens} tokens")
    if result.leaks:
        print(f"leaks:       {LEAKS}")
    if late := untrusted(read_run(folder).records):
        print(late.replace(": ", ":   ", 1))
    for name, text in network_cost(folder):
        print(f"{name + ':':12} {text}")
    print(f"everything:  {folder}")
    for index, command in enumerate(next_steps(config, options.config)):
        print(f"{'' if index else 'next:':12} {command}")


def _coordinator(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.coordinator import run_coordinator

    run_coordinator(load(options, overrides), _page(options))


def _page(options: argparse.Namespace) -> PageWish | None:
    return PageWish(options.dashboard, tuple(options.dashboard_host)) if options.dashboard else None


def _dashboard(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.dashboard import dashboard

    dashboard(options.run, options.bind, options.host)


def _node(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.node import run_node

    if not options.join:
        raise ConfigError("--join: give the coordinator's address, such as tcp://10.0.0.5:7070")
    config = load(options, overrides)
    run_node(config, options.join, options.bind, options.advertise, options.name, options.rank)


def _doctor(options: argparse.Namespace, overrides: list[str]) -> int:
    from node.commands.doctor import Wish, doctor

    wish = Wish(
        has_config=options.config is not None,
        listen=options.listen,
        nodes=options.nodes,
        join=options.join,
        bind=options.bind,
        advertise=options.advertise,
        name=options.name,
        wait_s=options.wait,
        out=options.out,
    )
    return doctor(lambda settings: load(options, [*overrides, *settings]), wish)


def _data(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.prepare import prepare

    here = "--coordinator.address=tcp://127.0.0.1:0"  # it serves nothing, so it needs no token
    print(f"corpus:      {prepare(load(options, [*overrides, here]))}")


def _launch(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.launch import Command, launch, spot_of

    typed = Command(options.config, options.preset, tuple(overrides))
    load_with = lambda settings: load(options, [*overrides, *settings])  # noqa: E731
    launch(typed, load_with, spot_of(os.environ), options.port, options.interface)


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


def _generate(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.generate import Wish, generate

    wish = Wish(options.prompt, options.tokens, options.temperature, options.seed)
    print(generate(options.source, wish, overrides))


def _report(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.watch.report import draw_comparison, draw_report

    if options.out is None and len(options.runs) > 1:
        raise ConfigError("--out: several runs go into one picture; give the file to write, such as --out runs.png")
    if options.out is None:
        print(draw_report(options.runs[0]))
    else:
        print(draw_comparison(options.runs, options.out))


def _watch(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.watch import watch

    watch(options.run, options.key)


def _trace(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.trace import write_step

    written = write_step(options.run, options.step, options.out)
    for line in written.nodes:
        print(line)
    print(f"trace:       {written.path}")
    print("open it:     https://ui.perfetto.dev, Open trace file; nothing leaves your machine")


def _keys(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.keys import write_keys

    write_keys(options.folder, options.nodes, tuple(options.name or ()))


def _settings(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.settings import show_settings

    show_settings(options.section, options.preset)


def _completion(options: argparse.Namespace, _rest: list[str]) -> None:
    from node.commands.completion import completion
    from node.options import parser

    print(completion(parser(), options.shell))


def _resolved(options: argparse.Namespace, overrides: list[str]) -> str:
    """The resolved config that the command would use, as TOML; of a study, that of each arm."""
    if options.command == "eval":
        from node.commands.evaluate import checkpoint_config, find_checkpoint

        return public_toml(checkpoint_config(find_checkpoint(options.checkpoint), overrides))
    if options.command == "study":
        from node.commands.study import print_study

        return print_study(options.name, options.base, overrides, options.preset)
    if options.command == "tunnel":
        from node.lab.tunnel.small import load_target

        return public_toml(load_target(options.target, (*given(options), *overrides), options.preset))
    return public_toml(plan_config_of(options, overrides) if options.command == "plan" else load(options, overrides))


# A command that has an answer of its own (`net verify`, `plan`, `tunnel`) returns its exit code.
_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int | None]] = {
    "run": _run,
    "coordinator": _coordinator,
    "node": _node,
    "data": _data,
    "doctor": _doctor,
    "launch": _launch,
    "eval": _eval,
    "export": _export,
    "generate": _generate,
    "report": _report,
    "dashboard": _dashboard,
    "watch": _watch,
    "trace": _trace,
    "study": study,
    "plan": plan,
    "tunnel": tunnel,
    "bench": bench,
    "experiment": experiment,
    "chaos": chaos,
    "net": net,
    "keys": _keys,
    "settings": _settings,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
