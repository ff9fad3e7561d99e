"""`isthmus tunnel`: a small run on this host, under a network that makes it behave like a big one elsewhere.

It writes into `out` a profile and a config for each mode (tunnel-MODE.toml, MODE.toml), report.md and report.json, and
with `run` also the folders of the runs. A run that misses the numbers is repeated, under a network that fits its
measured compute. The figures are those of the last run; the page also says which numbers earlier ones missed.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.records.folder import make_folder
from node.commands.node import interrupt
from node.commands.run import check_corpus, run_swarm
from node.config import Config, load_config, save_config
from node.lab.measured import read_measured
from node.lab.plan.assignments import settle
from node.lab.plan.costs import stated
from node.lab.plan.text import choice_lines
from node.lab.study.trial import host_line
from node.lab.tunnel.bench import measure
from node.lab.tunnel.check import judge
from node.lab.tunnel.design import Design, Goal, design, first_design, goal
from node.lab.tunnel.network import profile_toml
from node.lab.tunnel.page import Facts, Part, as_object, document, verdict_line
from node.lab.tunnel.small import load_target, modes_named, run_config, small_config
from node.measure.devices import device, devices

log = logging.getLogger("isthmus.tunnel")

ATTEMPTS = 3
"""Most runs of one mode."""


@dataclass(frozen=True)
class Wish:
    """The options of the command line."""

    target: str
    device: str
    mfu: float
    small: Path | None
    modes: tuple[str, ...]
    """By name; empty: all."""
    steps: int
    run: bool
    out: Path
    overrides: tuple[str, ...]
    """Settings of the target."""
    preset: str = ""
    """The target's preset; empty: none."""

    @property
    def command(self) -> str:
        """The command line that makes the same tunnel again."""
        small = ["--small", str(self.small)] if self.small else []
        preset = ["--preset", self.preset] if self.preset else []
        asked = [
            "--target",
            self.target,
            *preset,
            *self.overrides,
            "--device",
            self.device,
            "--mfu",
            f"{self.mfu:g}",
            *small,
        ]
        asked += [f"--mode={name}" for name in self.modes]
        asked += ["--steps", str(self.steps), "--out", str(self.out), *(["--run"] if self.run else [])]
        return shlex.join(["isthmus", "tunnel", *asked])


def tunnel(wish: Wish) -> int:
    """Build the tunnel, and with `wish.run` run it: 0, or 1 where a run missed the target's numbers."""
    on = device(wish.device)
    costs = stated(on, wish.mfu)
    target = load_target(wish.target, wish.overrides, wish.preset)
    target, choice = settle(target, costs, devices(on.name, target.coordinator.nodes))
    if choice is not None:
        log.info("%s", "\n".join(choice_lines(choice)))
    goals = [goal(target, mode, costs) for mode in modes_named(wish.modes)]
    shape = load_config(wish.small) if wish.small else None
    small = small_config(target, shape, wish.steps, wish.out)
    check_corpus(small)
    make_folder(wish.out)
    save_config(small, wish.out / "bench.toml")
    signal.signal(signal.SIGTERM, interrupt)
    log.info("measuring how long a layer takes here")
    modes = sorted({one.mode.compress for one in goals})
    benches = measure(small, wish.out / "bench.toml", wish.out / "bench.log", modes)
    cores = os.cpu_count() or 1
    parts = []
    for one in goals:
        bench = benches[one.mode.compress]
        parts.append(Part(one, bench, first_design(one, bench, run_config(small, one.mode, Path(), 2), cores)))
        _write(wish.out, parts[-1], small)
    facts = Facts(target, small, f"{on.name} at MFU {wish.mfu:g}", host_line(), wish.command)
    _report(wish.out, facts, parts)
    if wish.run:
        for place, part in enumerate(parts):
            parts[place] = _run(wish.out, part, small)
            _report(wish.out, facts, parts)
    print(document(facts, parts))
    if not wish.run:
        print("run it so, or with --run, which also checks the numbers:")
        print("\n".join(f"  isthmus run {wish.out / part.goal.mode.name}.toml" for part in parts))
    print(f"everything:  {wish.out}")
    return int(any(part.verdict is not None and not part.verdict.held for part in parts))


def _run(out: Path, part: Part, small: Config) -> Part:
    """Run one mode until its numbers are the target's, at most `ATTEMPTS` times."""
    for attempt in range(1, ATTEMPTS + 1):
        config = run_swarm(_write(out, part, small))
        verdict = judge(part.goal, part.design, part.bench, read_measured(config.run.folder))
        part = part._replace(verdict=verdict)
        print(verdict_line(part), flush=True)
        if verdict.held or attempt == ATTEMPTS:
            break
        better = design(part.goal, verdict.body, verdict.measured.framing, verdict.slower)
        part = part._replace(design=better, earlier=(*part.earlier, verdict_line(part)))
    return part


def _write(out: Path, part: Part, small: Config) -> Config:
    """Write the profile and the config of a mode; returns that config."""
    goal, made = part.goal, part.design
    path = out / f"tunnel-{goal.mode.name}.toml"
    path.write_text(profile_toml(made.profile, _comment(goal, made)), encoding="utf-8")
    config = run_config(small, goal.mode, path, made.sync_every)
    save_config(config, out / f"{goal.mode.name}.toml")
    return config


def _comment(goal: Goal, made: Design) -> str:
    return (
        f"Made by isthmus tunnel for the small model, {goal.mode.name}: {goal.profile},\n"
        f"the network of {goal.config.run.name}, scaled. A second here is {made.scale.time:.4g} s of the target's."
    )


def _report(out: Path, facts: Facts, parts: Sequence[Part]) -> None:
    (out / "report.md").write_text(document(facts, parts), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(as_object(facts, parts), indent=1) + "\n", encoding="utf-8")
