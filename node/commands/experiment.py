"""`isthmus experiment figure2`: one small model in the wind tunnel, centralized, compressed and uncompressed.

It may be interrupted: a complete run is not made again, one that has a checkpoint goes on from it, and what was
measured before the runs is kept in their folder. Page, picture and figures are written anew after each arm.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import msgspec

from coordinator.records.folder import CONFIG, latest_complete, make_folder, step_of
from netem.config import flat
from netem.errors import ConfigError
from node.commands.node import interrupt
from node.commands.run import check_corpus, run_swarm
from node.commands.written import write_text
from node.config import Config, load_config, save_config, to_tree
from node.lab.experiment.arms import ARMS, arms_named, calibration, check_steps, training
from node.lab.experiment.clock import emulated_s
from node.lab.experiment.page import Curve, Facts, as_object, document
from node.lab.experiment.picture import draw
from node.lab.experiment.stage import Stage, keep, kept, load_arm_target, small_of, stage, with_compress
from node.lab.measured import read_measured
from node.lab.plan.costs import stated
from node.lab.study.trial import host_line
from node.lab.tunnel.bench import Bench, measure
from node.lab.tunnel.network import profile_toml
from node.measure.devices import device
from node.watch.recorded import read_run

log = logging.getLogger("isthmus.experiment")

DEVICE, MFU = "a100", 0.4
SHAPE = Path("configs/figure.toml")
"""The small model's widths, chunk length and data."""


@dataclass(frozen=True)
class Wish:
    """The options of the command line."""

    steps: int
    arms: tuple[str, ...]
    """By name; empty: all."""
    runs: Path
    png: Path
    page: Path
    overrides: tuple[str, ...]
    """Settings of the target."""

    @property
    def command(self) -> str:
        """The command line that makes the same again."""
        asked = ["--steps", str(self.steps), *(f"--arm={name}" for name in self.arms), "--runs", str(self.runs)]
        asked += ["--png", str(self.png), "--page", str(self.page)]
        return shlex.join(["isthmus", "experiment", "figure2", *self.overrides, *asked])


def experiment(wish: Wish) -> None:
    """Run the arms that are not complete, and write the page. Raises `ConfigError` before anything runs where the
    folder holds something else."""
    arms = arms_named(wish.arms)
    check_steps(wish.steps)
    shape = load_config(SHAPE)
    targets = {arm.name: load_arm_target(arm, wish.overrides) for arm in ARMS}
    small = small_of(targets["compressed"], shape, wish.runs)
    check_corpus(small)
    make_folder(wish.runs)
    signal.signal(signal.SIGTERM, interrupt)
    benches = _benches(wish, small)
    costs = stated(device(DEVICE), MFU)
    curves: list[Curve] = []
    for arm in arms:
        target = targets[arm.name]
        staged = stage(arm, target, with_compress(small, target), costs, benches)
        curves.append(_curve(wish, staged))
        _write(wish, targets["compressed"], curves)
    print(wish.page.read_text(encoding="utf-8"))
    print(f"everything:  {wish.page}, {wish.png}; the runs: {wish.runs}")


def _benches(wish: Wish, small: Config) -> dict[str, Bench]:
    """How long a layer takes here, measured now or in an earlier call."""
    path = wish.runs / "bench.json"
    asked = {"steps": wish.steps, "settings": list(wish.overrides)}
    if (found := kept(path, asked, small)) is not None:
        return found
    log.info("measuring how long a layer takes here")
    save_config(small, wish.runs / "bench.toml")
    benches = measure(small, wish.runs / "bench.toml", wish.runs / "bench.log")
    keep(path, asked, benches)
    return benches


def _curve(wish: Wish, staged: Stage) -> Curve:
    """Calibrate and run an arm, or read what earlier calls have left of it."""
    arm = staged.arm
    first = calibration(staged.small, arm, _profile(wish, staged, "calibrate"))
    _run(first)
    staged = staged.calibrated(read_measured(first.run.folder))
    config = training(staged.small, arm, _profile(wish, staged, "train"), wish.steps)
    load_path = wish.runs / f"{arm.name}.load"
    if _run(config) or not load_path.exists():
        load_path.write_text(f"{os.getloadavg()[0]:.2f}\n")
    verdict = staged.judge(read_measured(config.run.folder))
    records = read_run(config.run.folder).records
    return Curve(staged, verdict, records, emulated_s(records, staged, verdict), float(load_path.read_text()))


def _profile(wish: Wish, staged: Stage, what: str) -> Path:
    path = wish.runs / f"{what}-{staged.arm.name}-network.toml"
    comment = (
        f"Made by isthmus experiment figure2: {staged.goal.profile},\nscaled to the small model, {staged.arm.name}."
    )
    path.write_text(profile_toml(staged.design.profile, comment), encoding="utf-8")
    return path


def _run(config: Config) -> bool:
    """Run to the end; whether there was anything left to run."""
    folder = config.run.folder
    _check_same(config)
    checkpoint = latest_complete(folder)
    if checkpoint is not None and step_of(checkpoint) == config.train.steps:
        log.info("%s: complete, and not run again", config.run.name)
        return False
    if checkpoint is None and folder.exists():
        log.info("%s: was interrupted before its first checkpoint, and begins again", config.run.name)
        shutil.rmtree(folder)
    if checkpoint is not None:
        log.info("%s: goes on from step %d", config.run.name, step_of(checkpoint))
        config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, resume=True))
    run_swarm(config)
    return True


def _check_same(config: Config) -> None:
    """Raise `ConfigError` where the folder holds a run of another model, method, schedule or data, network apart."""
    path = config.run.folder / CONFIG
    if not path.exists():
        return
    had, wanted = flat(to_tree(load_config(path))), flat(to_tree(config))
    for key, value in wanted.items():
        if not key.startswith(("run.", "net.", "coordinator.")) and had.get(key) != value:
            raise ConfigError(
                f"--runs {config.run.outputs}: {config.run.name} was trained with {key} = {had.get(key)!r}, and "
                f"{value!r} is asked for; name another folder, or delete it"
            )


def _write(wish: Wish, target: Config, curves: Sequence[Curve]) -> None:
    picture = os.path.relpath(wish.png, wish.page.parent)
    facts = Facts(wish.command, host_line(), date.today().isoformat(), target, f"{DEVICE} at MFU {MFU:g}", picture)
    draw(curves, wish.png)
    write_text(wish.page, document(facts, curves), "--page")
    write_text(wish.page.with_suffix(".json"), json.dumps(as_object(facts, curves)) + "\n", "--page")
