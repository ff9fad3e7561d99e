"""The last lines of `isthmus run`: what the network cost, what it would have cost uncompressed, what to try next.

The run's own steps are measured; the other two figures are the planner's, fitted to this run.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from netem.errors import ConfigError
from node.config import Config
from node.lab.measured import read_measured
from node.lab.plan.fit import case, fit
from node.lab.plan.predict import predict
from node.lab.plan.text import seconds
from node.measure.devices import default_device, devices


def network_cost(folder: Path) -> list[tuple[str, str]]:
    """(name, text) of each line about the network of the run in `folder`; none of a run that is too short to tell."""
    try:
        found = case(read_measured(folder))
    except ConfigError:
        return []
    config, measured = found.measured.config, found.measured
    if config.coordinator.nodes == 1 or config.coordinator.layout.columns > 1:
        return []  # the planner lets the processes of a node share its lines, which the emulated network does not
    costs, on = fit([found]), devices(default_device(config.run.device), config.coordinator.nodes)
    plan = predict(config, costs, on)
    free_s = measured.step_s * plan.free_s / plan.exchange_step_s
    lines = [
        (
            "link",
            f"a step took {seconds(measured.step_s)}; on a network without limits it would take {seconds(free_s)} "
            f"(planned from this run), so {plan.network} cost {1 - free_s / measured.step_s:.0%} of it",
        )
    ]
    if config.compress.compresses:
        whole = predict(_uncompressed(config), costs, on)
        times = whole.exchange_step_s / plan.exchange_step_s
        lines.append(
            (
                "uncompressed",
                f"{seconds(times * measured.step_s)} a step, {times:.1f} times as long (planned from this run)",
            )
        )
    return lines


def next_steps(config: Config, config_path: Path) -> list[str]:
    """Commands to try after a run of `config_path`."""
    folder = config.run.folder
    steps = []
    if not config.compress.compresses or config.compress.is_unplugged_at(config.train.steps):
        steps.append(f"isthmus export {folder} {config.run.name}-hf")
    if config.compress.compresses:
        steps.append(f"isthmus run {config_path} --compress.mode dense --run.name {config.run.name}-dense")
    steps.append(f"isthmus plan {config_path} --fit {folder} --net home-cable")
    return steps


def _uncompressed(config: Config) -> Config:
    compress = msgspec.structs.replace(
        config.compress, mode="dense", format="bfloat16", dense_format="same", grad_format="same"
    )
    return msgspec.structs.replace(config, compress=compress)
