"""How the commands that ask questions read their options: study, net, plan, tunnel, bench, experiment."""

from __future__ import annotations

import argparse

from netem.errors import ConfigError
from node.commands.load import load
from node.config import Config


def study(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.study import Wish, redraw, run_study, show_checkpoint, show_studies
    from node.lab.study.record import Recipe

    recipe = Recipe(options.name, options.base, options.seeds, tuple(overrides), options.preset)
    if options.redraw:
        if overrides or options.preset or options.checkpoint is not None:
            raise ConfigError("--redraw: takes a study's name, --base and --out, and nothing else")
        for page in redraw(recipe.stem, options.out):
            print(f"study:       {page}")
    elif options.checkpoint is not None:
        if options.name != "spectrum" or overrides:
            raise ConfigError("--checkpoint: goes with `isthmus study spectrum`, and with nothing else")
        show_checkpoint(options.checkpoint)
    elif not options.name:
        if overrides:
            raise ConfigError(f"{' '.join(overrides)}: name a study; `isthmus study` lists them")
        show_studies()
    else:
        print(f"study:       {run_study(Wish(recipe, options.jobs, options.out, options.extend))}")


def net(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.net_command != "verify":
        return _change_net(options)
    from node.commands.net import Wish, verify

    wish = Wish(
        tuple(options.profile or ()), options.suite, options.quick, options.json, options.markdown, tuple(overrides)
    )
    return verify(wish)


def _change_net(options: argparse.Namespace) -> int:
    from netem.changes import ChangeConfig
    from node.commands.change import change_network

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
    return change_network(options.coordinator, options.key, change)


def plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from node.commands.plan import Question, check_against, plan_config
    from node.lab.plan.costs import MFU

    if options.validate:
        if options.config is not None or overrides:
            raise ConfigError("--validate: takes folders of runs, and their configs with them; give it nothing else")
        check_against(options.validate)
        return 0
    if options.fit and options.mfu is not None:
        raise ConfigError("--mfu: a fit to runs takes its place; give one of the two")
    config = plan_config_of(options, overrides)
    mfu = MFU if options.mfu is None else options.mfu
    contexts, runs = tuple(options.contexts), tuple(options.fit)
    return plan_config(config, Question(options.device, mfu, runs, contexts, options.json, options.png))


def plan_config_of(options: argparse.Namespace, overrides: list[str]) -> Config:
    # A plan listens nowhere, so it needs no token.
    if options.config is None:
        raise ConfigError("CONFIG: give a TOML file, such as configs/demo.toml, or --validate with folders of runs")
    return load(options, [*given(options), "--coordinator.address=tcp://127.0.0.1:0", *overrides])


def given(options: argparse.Namespace) -> list[str]:
    """The settings for which `plan` and `tunnel` have short options."""
    nodes = [] if options.nodes is None else [f"--coordinator.nodes={options.nodes}"]
    return nodes + ([] if options.net is None else [f"--net.profile={options.net}"])


def tunnel(options: argparse.Namespace, overrides: list[str]) -> int:
    from node.commands.tunnel import Wish, tunnel

    wish = Wish(
        target=options.target,
        preset=options.preset,
        device=options.device,
        mfu=options.mfu,
        small=options.small,
        modes=tuple(options.mode or ()),
        steps=options.steps,
        run=options.run,
        out=options.out,
        overrides=(*given(options), *overrides),
    )
    return tunnel(wish)


def bench(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.bench import Wish, bench

    bench(Wish(options.config, options.nodes, options.rate, options.quick, options.out, tuple(overrides)))


def experiment(options: argparse.Namespace, overrides: list[str]) -> None:
    from node.commands.experiment import Wish, experiment

    arms = tuple(options.arm or ())
    experiment(Wish(options.steps, arms, options.runs, options.png, options.page, tuple(overrides)))


def chaos(options: argparse.Namespace, overrides: list[str]) -> int:
    from node.commands.chaos import Wish, chaos

    wish = Wish(options.seed, options.minutes, options.gap, tuple(options.kind), options.spare, options.out)
    return chaos(load(options, overrides), wish)
