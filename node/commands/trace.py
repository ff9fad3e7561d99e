"""`isthmus trace`: one step of a run, as its nodes recorded it, in one file for https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coordinator.records.metrics import describe_steps
from netem.errors import ConfigError
from node.measure.trace_file import TRACE, StepLine, read_steps
from node.watch.trace import write_trace


class Written(NamedTuple):
    """Where the trace is, and a line for each node: how its step was spent."""

    path: Path
    nodes: list[str]


def write_step(run_folder: Path, step: int, out: Path | None) -> Written:
    """Join what the nodes have recorded of `step`. Raises `ConfigError` where they have not, or a file is damaged."""
    steps = read_steps(run_folder)
    if step not in steps:
        there = describe_steps(_spans(sorted(steps)))
        raise ConfigError(
            f"--step {step}: {run_folder / TRACE} has no such step, but {there}; a run records it with "
            f"--run.trace {max(1, step)}"
        )
    path = out or run_folder / TRACE / f"step-{step}.json"
    write_trace(steps[step], path, run_folder.resolve().name)
    return Written(path, [_spent(node) for node in steps[step]])


def _spent(node: StepLine) -> str:
    total_s = node.ended_s - node.began_s
    parts = [
        f"{name.replace('_', ' ')} {seconds / total_s:.0%}"
        for name, seconds in node.accounts_s.items()
        if total_s > 0 and seconds / total_s >= 0.005
    ]
    return f"{node.name}: {total_s:.3f} s: {', '.join(parts)}"


def _spans(numbers: Sequence[int]) -> list[range]:
    """Rising numbers as ranges of neighbours."""
    ranges: list[range] = []
    for number in numbers:
        if ranges and ranges[-1].stop == number:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))
    return ranges
