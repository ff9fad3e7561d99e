"""Isthmus in the benchmark: a coordinator and one `isthmus node` a host, as on several machines.

The network is real, so the config's own emulation is off (`net.profile = "unshaped"`). A run has few steps: the first
takes the basis, some are cold, the last averages weights; the rest are measured.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from coordinator.records.folder import ADDRESS
from coordinator.records.rates import nodes_of, number
from netem.children import Child, Children, failed_first
from netem.errors import IsthmusError
from netem.verify.lan import Lan
from node.config import TOKEN_VARIABLE, Config, load_config, save_config
from node.lab.bench.arms import NodeArm
from node.lab.measured import COLD_STEPS
from node.watch.recorded import read_run

RUN_S = 300.0
START_S = 60.0
_OTHER_STEPS = 1 + COLD_STEPS + 1
"""Steps that do not count: the one with the basis, the cold ones, and the last."""


class NodeRun(NamedTuple):
    """The measured steps of one run."""

    steps_s: list[float]
    """Each step's time on the slowest node."""
    busiest_bps: float
    """Bits per second that the busiest node put on the wire during the median step."""


def node_config(path: Path, arm: NodeArm, common: Sequence[str], steps: int) -> Config:
    """The config of an arm, for so many measured steps; its address and folder are still to come."""
    settings = [
        "--compress.warmup_steps=0",
        "--compress.dense_format=same",
        "--compress.grad_format=same",
        "--train.eval_every=0",
        "--train.checkpoint_every=0",
        "--train.eval_batches=1",
        f"--train.steps={steps + _OTHER_STEPS}",
        f"--train.sync_every={steps + _OTHER_STEPS}",
        f"--train.micro_batches={arm.micro_batches}",
        "--net.profile=unshaped",
        "--run.threads=1",
    ]
    return load_config(path, [*common, *settings, *arm.settings], arm.preset)


def run_nodes(net: Lan, path: Path, arm: NodeArm, common: Sequence[str], steps: int, outputs: Path) -> NodeRun:
    """Run an arm on the hosts of `net`. Raises `IsthmusError` where it fails or takes longer than `RUN_S`."""
    name = f"{arm.name.replace(' ', '-').replace(',', '')}-{secrets.token_hex(2)}"
    placed = [f"--coordinator.address=tcp://{net.hub.address}:0", f"--run.name={name}", f"--run.outputs={outputs}"]
    token = secrets.token_urlsafe(24)
    config = node_config(path, arm, [*common, *placed, f"--coordinator.token={token}"], steps)
    config_path = outputs / f"{name}.toml"
    save_config(config, config_path)
    _run(net, config, config_path, {**os.environ, TOKEN_VARIABLE: token, "OMP_WAIT_POLICY": "PASSIVE"})
    return _read(config.run.folder, steps)


def _run(net: Lan, config: Config, config_path: Path, environment: dict[str, str]) -> None:
    with Children() as children:
        log_path = config_path.with_suffix(".log")

        def start(name: str, prefix: Sequence[str], *arguments: str) -> Child:
            command = [*prefix, sys.executable, "-m", "node.cli", *arguments]
            return children.start(name, command, log_path=log_path, environment=environment)

        processes = [start("the coordinator", net.hub.prefix, "coordinator", str(config_path))]
        address = _await_address(processes[0], config.run.folder / ADDRESS)
        for rank, host in enumerate(net.hosts):
            bind = f"tcp://{host.address}:0"
            asked = ("--join", address, "--bind", bind, "--rank", str(rank))
            processes.append(start(f"node-{rank}", host.prefix, "node", str(config_path), *asked))
        ended = children.await_all(RUN_S)
        if culprit := failed_first(processes):
            raise IsthmusError(f"{culprit.describe()} (the log is {log_path})")
        if not ended:
            raise IsthmusError(f"the run did not end within {RUN_S:.0f} s (the log is {log_path})")


def _await_address(coordinator: Child, path: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if path.exists() and (address := path.read_text()).endswith("\n"):
            return address.strip()
        if coordinator.wait(0.05):
            break
    raise IsthmusError(f"the coordinator did not listen: {coordinator.describe()}")


def _read(folder: Path, steps: int) -> NodeRun:
    """The last steps before the one that averages."""
    records = read_run(folder).records[-1 - steps : -1]
    steps_s = [number(record, "step_s") for record in records]
    busiest_bytes = median(
        max(number(node, "sent_wire_bytes") for node in nodes_of(record).values()) for record in records
    )
    return NodeRun(steps_s, 8 * busiest_bytes / median(steps_s))
