"""The small runs against which the planner is tested: `python -m node.lab.plan.trials [overlap | NAME …]`.

Makes the runs that are missing under outputs/plan/, one after the other, then fits to half of all, predicts the others,
and writes docs/netem/planner.md. With "overlap" it does so for the runs whose steps have one or two passes, in each
assignment, and writes docs/bench/overlap.md. With names, it makes only those runs and writes nothing. The machine
should be idle otherwise. The runs are short, and differ in model, nodes, mode, ownership, rate, scope, latency and
passes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from node.lab.measured import read_measured
from node.lab.plan.fit import case
from node.lab.plan.validate import table, validate
from node.lab.study.trial import host_line

RUNS = Path("outputs/plan")
DOCUMENT = Path("docs/netem/planner.md")
OVERLAP_DOCUMENT = Path("docs/bench/overlap.md")
BASE = "configs/figure.toml"

COMMON = {
    "train.steps": "20",
    "train.batch": "2",
    "train.sync_every": "8",
    "train.eval_every": "0",
    "train.eval_batches": "1",
    "compress.warmup_steps": "4",
    "run.outputs": str(RUNS),
}
LONG = {"model.context": "2048"}
DEEP = {"model.layers": "10", "model.d_model": "96"}
WIDE = {"model.d_model": "256", "model.ffn_dim": "768", "model.layers": "4"}
TWO, FOUR = {"coordinator.nodes": "2"}, {"coordinator.nodes": "4"}
ZIGZAG = {"coordinator.assignment": "zigzag"}
SUBSPACE, DENSE, LOCAL = ({"compress.mode": mode} for mode in ("subspace", "dense", "local"))


def _net(rate: str, scope: str = "link", latency: str = "25 ms") -> dict[str, str]:
    return {"net.rate": rate, "net.scope": scope, "net.latency": latency}


# Every other one, in order of names, is used for the fit: both halves have every mode, model and number of nodes.
TRIALS: dict[str, dict[str, str]] = {
    "01-base-2-subspace-300": TWO | SUBSPACE | _net("300 Mbit/s"),
    "02-base-2-dense-300": TWO | DENSE | _net("300 Mbit/s"),
    "03-base-2-dense-30": TWO | DENSE | _net("30 Mbit/s"),
    "04-base-2-subspace-30": TWO | SUBSPACE | _net("30 Mbit/s"),
    "05-base-4-subspace-100-nic": FOUR | SUBSPACE | _net("100 Mbit/s", "nic"),
    "06-base-4-dense-100-nic": FOUR | DENSE | _net("100 Mbit/s", "nic"),
    "07-base-4-dense-200": FOUR | DENSE | _net("200 Mbit/s"),
    "08-base-4-local": FOUR | LOCAL | _net("100 Mbit/s"),
    "09-long-2-subspace-50": TWO | LONG | SUBSPACE | _net("50 Mbit/s"),
    "10-long-2-dense-50": TWO | LONG | DENSE | _net("50 Mbit/s"),
    "11-long-2-local": TWO | LONG | LOCAL | _net("50 Mbit/s"),
    "12-base-4-subspace-50": FOUR | SUBSPACE | _net("50 Mbit/s"),
    "13-deep-2-dense-100-far": TWO | DEEP | DENSE | _net("100 Mbit/s", latency="80 ms"),
    "14-deep-2-subspace-100-far": TWO | DEEP | SUBSPACE | _net("100 Mbit/s", latency="80 ms"),
    "15-wide-2-subspace-40-zigzag": TWO | WIDE | SUBSPACE | ZIGZAG | _net("40 Mbit/s"),
    "16-wide-2-dense-40-zigzag": TWO | WIDE | DENSE | ZIGZAG | _net("40 Mbit/s"),
}

ONCE, TWICE = {"train.micro_batches": "1"}, {"train.micro_batches": "2"}
CONTIGUOUS, AUTO = {"coordinator.assignment": "contiguous"}, {"coordinator.assignment": "auto"}
EIGHT = {"model.chunks": "8", "compress.dense_last_layers": "0", "compress.format": "bfloat16"}

# As above, every other one is used for the fit: both halves have one pass and two, and each assignment.
OVERLAP: dict[str, dict[str, str]] = {
    "31-one-contiguous-60": TWO | EIGHT | ONCE | DENSE | CONTIGUOUS | _net("60 Mbit/s"),
    "32-two-contiguous-60": TWO | EIGHT | TWICE | DENSE | CONTIGUOUS | _net("60 Mbit/s"),
    "33-two-zigzag-100": TWO | EIGHT | TWICE | DENSE | ZIGZAG | _net("100 Mbit/s"),
    "34-one-zigzag-100": TWO | EIGHT | ONCE | DENSE | ZIGZAG | _net("100 Mbit/s"),
    "35-one-auto-100": TWO | EIGHT | ONCE | DENSE | AUTO | _net("100 Mbit/s", latency="1 ms"),
    "36-two-auto-30": TWO | EIGHT | TWICE | DENSE | AUTO | _net("30 Mbit/s", latency="1 ms"),
    "37-one-zigzag-sub-30": TWO | EIGHT | ONCE | SUBSPACE | ZIGZAG | _net("30 Mbit/s"),
    "38-two-zigzag-sub-30": TWO | EIGHT | TWICE | SUBSPACE | ZIGZAG | _net("30 Mbit/s"),
    "39-two-contiguous-sub-30": TWO | EIGHT | TWICE | SUBSPACE | CONTIGUOUS | _net("30 Mbit/s"),
    "40-two-auto-sub-30": TWO | EIGHT | TWICE | SUBSPACE | AUTO | _net("30 Mbit/s", latency="1 ms"),
}


def settings_of(name: str) -> dict[str, str]:
    """The settings in which a trial differs from `BASE`."""
    return COMMON | (TRIALS | OVERLAP)[name]


def main(names: list[str]) -> int:
    """Make the runs; the exit code is 0, or 2 for an unknown name."""
    every = TRIALS | OVERLAP
    whole = {(): (TRIALS, DOCUMENT), ("overlap",): (OVERLAP, OVERLAP_DOCUMENT)}.get(tuple(names))
    if unknown := [name for name in names if name not in every and whole is None]:
        print(f"{', '.join(unknown)}: no such trial; there are {', '.join(every)}", file=sys.stderr)
        return 2
    for name in whole[0] if whole else names:
        _run(name)
    if whole:
        trials, path = whole
        validation = validate([case(read_measured(RUNS / name)) for name in trials])
        path.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m node.lab.plan.trials", *names])
        path.write_text(_document(command, table(validation)), encoding="utf-8")
        print(path)
    return 0


def _run(name: str) -> None:
    """Make one run, unless it is there. An interrupted one is deleted and made again."""
    folder = RUNS / name
    done = folder / "trial-is-done"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [f"--{key}={value}" for key, value in (settings_of(name) | {"run.name": name}).items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "node.cli", "run", BASE, *arguments], env=environment, check=True)
    done.touch()


def _document(command: str, rows: str) -> str:
    return f"""# The planner against runs

Made by `{command}`, on {host_line()}. All nodes of a run share this machine's cores; the links are
emulated. Times are those of an ordinary step (no averaging of weights, no evaluation), medians over the run; compute is
the time that a node neither waits nor averages, the mean over nodes. Every other run was used to fit the costs; which
ones was decided before any run was made.

{rows}

The conclusions are in [README](../netem/README.md).
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
