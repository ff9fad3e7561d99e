"""What encryption costs a training: tokens a second at 300 Mbit/s with and without it, whole runs by turns.

    PYTHONPATH=. python tests/benchmarks/encryption_speed.py [--pairs N] [--steps N] [--out FILE]

Two nodes exchange whole keys and values, so that the link is what a step waits for most. All processes share this
machine's cores, so CPU time that CURVE takes is time that is not there for training: with a machine for each node it
costs less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from coordinator.records.folder import METRICS
from coordinator.records.metrics import read_records
from coordinator.records.rates import time_share
from netem.tables import markdown_table

WAYS = ("never", "always")
SKIPPED = 5
"""First steps, in which caches fill."""
SETTINGS = [
    *("--coordinator.nodes=2", "--compress.mode=dense", "--net.profile=internet-300mbps", "--net.scope=nic"),
    *("--train.eval_every=0", "--train.eval_batches=1", "--train.sync_every=1", "--run.threads=1"),
    *("--data.max_tokens=200000",),
]


def train(encryption: str, steps: int, folder: Path) -> tuple[float, float]:
    """One run: median tokens a second of its steps, and the share of the time that it waited for the network."""
    own = [f"--coordinator.encryption={encryption}", f"--train.steps={steps}", f"--run.outputs={folder}"]
    command = [sys.executable, "-m", "node.cli", "run", "configs/figure.toml", *SETTINGS, *own]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    records = read_records(folder / "figure" / METRICS)[SKIPPED:-1]
    return median(record["tokens"] / record["step_s"] for record in records), time_share(records, "exposed_s") or 0.0


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for pair in range(options.pairs):
        for way in WAYS if pair % 2 == 0 else WAYS[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(train(way, options.steps, Path(folder)))
            print(way, *(f"{value:.3f}" for value in found[way][-1]), flush=True)
    rows = []
    for way in WAYS:
        speeds, shares = zip(*found[way], strict=True)
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        rows.append([way, f"{median(speeds):.0f}", spread, f"{median(shares):.0%}"])
    ratio = median(on / off for (off, _), (on, _) in zip(found["never"], found["always"], strict=True))
    text = markdown_table(["encryption", "tokens/s, median", "of runs", "waits for the network"], rows, align="lr")
    text += f"\n\nwith encryption over without, median of pairs: {ratio:.3f}"
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
