"""The wind tunnel of one arm: its target, the small model's compute, and its networks before and after calibration.

What a bench has measured is kept in the experiment's folder, so that an interrupted experiment goes on under the same
networks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.records.folder import whole_file
from netem.config import convert
from netem.errors import ConfigError
from node.config import Config, to_tree
from node.lab.experiment.arms import Arm
from node.lab.measured import Measured
from node.lab.plan.costs import Costs
from node.lab.plan.model import Model
from node.lab.tunnel.bench import Bench
from node.lab.tunnel.check import Verdict, judge
from node.lab.tunnel.design import Design, Goal, design, first_design, goal
from node.lab.tunnel.similitude import Body, Kind, kinds_of
from node.lab.tunnel.small import Mode, load_target, run_config, small_config

TARGET = "paper-800m"
SETTING = ("--coordinator.nodes=4", "--net.profile=internet-300mbps", "--train.batch=2", "--train.micro_batches=1")
"""The ratios are those of whole batches; how a run deals its contexts to passes (`arms.PASSES`) changes none."""


class Stage(NamedTuple):
    """One arm in the tunnel."""

    arm: Arm
    goal: Goal
    small: Config
    """The small model with the arm's [compress], on no network yet."""
    bench: Bench
    design: Design
    """By the bench alone until `calibrated`."""

    def calibrated(self, measured: Measured) -> Stage:
        """With the network that fits the compute, the bytes and the averaging of a run."""
        verdict = self.judge(measured)
        return self._replace(design=design(self.goal, verdict.body, measured.framing, verdict.slower))

    def judge(self, measured: Measured) -> Verdict:
        """A run beside the target."""
        return judge(self.goal, self.design, self.bench, measured)


def load_arm_target(arm: Arm, overrides: tuple[str, ...]) -> Config:
    """The target with the arm's settings; settings of the user come last."""
    return load_target(TARGET, (*SETTING, *arm.settings, *overrides))


def small_of(target: Config, shape: Config, folder: Path) -> Config:
    """The small model for a target, with the target's [compress]."""
    return small_config(target, shape, 1000, folder)


def stage(arm: Arm, target: Config, small: Config, costs: Costs, benches: dict[str, Bench]) -> Stage:
    """The arm's tunnel by the bench alone. The bench knows the compute of a layer, the arm's formats its bytes."""
    mode = Mode(arm.name, arm.mode, arm.network)
    wanted = goal(target, mode, costs)
    own = run_config(small, mode, Path(), 2)
    bench = with_payloads(benches[arm.mode], own)
    return Stage(arm, wanted, small, bench, first_design(wanted, bench, own, os.cpu_count() or 1))


def with_payloads(bench: Bench, config: Config) -> Bench:
    """The bench with the payload bytes of `config`, whose layers compute as long."""
    model = Model(config)
    sent = kinds_of(model, [(1.0, 1.0)] * len(model.step.layers))
    kinds = {name: kind._replace(payload_bytes=sent[name].payload_bytes) for name, kind in bench.body.kinds.items()}
    return bench._replace(body=bench.body._replace(kinds=kinds))


def keep(path: Path, asked: dict[str, Any], benches: dict[str, Bench]) -> None:
    """Write the benches, and what they are for."""
    tree = {
        mode: bench._asdict()
        | {"body": {"kinds": bench.body.kinds, "step_s": bench.body.step_s, "parameters": bench.body.parameters}}
        for mode, bench in benches.items()
    }
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps({"asked": asked, "benches": tree}, indent=1) + "\n", encoding="utf-8")


def kept(path: Path, asked: dict[str, Any], small: Config) -> dict[str, Bench] | None:
    """The benches of an earlier call; None where there was none. Raises `ConfigError` where it asked for other runs."""
    if not path.exists():
        return None
    tree = json.loads(path.read_text(encoding="utf-8"))
    if tree["asked"] != asked:
        raise ConfigError(
            f"--runs {path.parent}: holds other runs ({tree['asked']}); name another folder, or delete it"
        )
    return {mode: _bench(entry, small) for mode, entry in tree["benches"].items()}


def with_compress(small: Config, target: Config) -> Config:
    """The small model with the number formats and layers of another target's [compress]."""
    tree = to_tree(small)
    tree["compress"] = to_tree(target.compress) | {
        key: tree["compress"][key] for key in ("mode", "warmup_steps", "refresh_every", "unplug_step")
    }
    return convert(Config, tree)


def _bench(entry: dict[str, Any], small: Config) -> Bench:
    body = entry["body"]
    kinds = {name: Kind(*kind) for name, kind in body["kinds"].items()}
    made = Body(small.assignment(), kinds, body["step_s"], body["parameters"])
    return Bench(made, entry["rank"], entry["evenness"], entry["crowding"])
