"""Bodies, benches and runs for the tests of the tunnel: what a bench and a run would have said, made up."""

from __future__ import annotations

import json
from pathlib import Path

from coordinator.events import PER_LINK
from coordinator.records.folder import CONFIG, METRICS
from helpers import ROOT
from node.config import Config, save_config
from node.lab.plan.averaging import averaging_s
from node.lab.plan.costs import Costs, stated
from node.lab.plan.model import Model
from node.lab.tunnel.bench import Bench
from node.lab.tunnel.design import Design
from node.lab.tunnel.similitude import Body, body_of
from node.lab.tunnel.small import load_target
from node.measure.devices import device

PAPER = str(ROOT / "configs" / "paper-800m.toml")
A100 = stated(device("a100"), 0.4)
HERE = Costs(flops_per_s=4e10)


def target(*overrides: str, nodes: int = 4, net: str = "internet-300mbps") -> Config:
    return load_target(PAPER, [f"--coordinator.nodes={nodes}", f"--net.profile={net}", *overrides])


def bench_of_work(config: Config, crowding: float = 1.0) -> Bench:
    """A host that computes as the planner says, all ranks of which are slowed as much where they compute at once."""
    return Bench(body_of(Model(config), HERE), config.coordinator.nodes - 1, 0.6, crowding)


def write_run(folder: Path, config: Config, made: Design, body: Body, late: float = 0.0, framing: float = 1.0) -> None:
    """The records of a run whose fullest node, the last, computed like `body`, and whose links were `late`, a share,
    and carried `framing` times the payloads' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG)
    ranks, step_s = config.coordinator.nodes, 3 * body.step_s
    round_s = averaging_s(body.parameters, made.lines, body.averages_in) * framing
    lines = []
    for step in range(1, config.train.steps + 1):
        rare = step not in (1, config.train.steps)
        averages = 0.0 if rare and made.sync_every > 1 else round_s
        nodes = {}
        for rank in range(ranks):
            busy_s = body.step_s * (1.0 if rank == ranks - 1 else 0.5)
            waits_s = averages * (1.0 if rank == ranks - 1 else 2.0)  # for the last to come to the round
            nodes[f"node-{rank}"] = {
                "step_s": step_s + waits_s,
                "exposed_s": step_s - busy_s,
                "averaging_s": waits_s,
                f"{PER_LINK}node-{(rank + 1) % ranks}/promised_s": 1.0,
                f"{PER_LINK}node-{(rank + 1) % ranks}/missed_s": late,
            }
        record = {
            "step": step,
            "time": 1e9 + step * step_s,
            "loss": 3.0,
            "step_s": step_s + 2 * averages,
            "averaging_s": 2 * averages,
            "sent_wire_bytes": 1000.0 * framing,
            "dense_bytes": 900.0,
            "compressed_bytes": 100.0,
            "nodes": nodes,
        }
        lines.append(json.dumps(record) + "\n")
    (folder / METRICS).write_text("".join(lines), encoding="utf-8")
