"""What the nodes measured, as files: one JSON object a step, and TensorBoard events.

`aggregate` is the rule that turns the nodes' values into the run's: sums, extremes, means, and losses per
token. The recorder knows keys only by their endings (units, mostly), and nothing of training. `run` says
when to record.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter

from coordinator.events import PER_LINK, Record

_METRICS: Final = "metrics.jsonl"

# A loss is per token of all nodes: Σ numerator / Σ denominator.
LOSSES: Final = {
    "loss": ("loss_sum", "tokens"),
    "heldout_loss": ("heldout_loss_sum", "heldout_tokens"),
}
# The first ending that fits decides; what fits none is averaged.
_RULES: Final[tuple[tuple[str, Callable[[list[float]], float]], ...]] = (
    ("_bytes", math.fsum),
    ("tokens", math.fsum),
    ("_sum", math.fsum),
    ("_per_s", math.fsum),
    ("_bps", math.fsum),
    ("_s", max),  # of times the slowest node's counts
)


def aggregate(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One value a key over all nodes that report it.

    Sums of bytes, tokens, sums and rates; the maximum of times (``_s``); means of all else. `LOSSES` are
    added where their parts are there and the denominator is not 0. Keys of single links are left out.
    """
    keys = sorted({key for values in nodes.values() for key in values if not key.startswith(PER_LINK)})
    totals = {key: _combine(key, [values[key] for values in nodes.values() if key in values]) for key in keys}
    for key, (numerator, denominator) in LOSSES.items():
        if numerator in totals and totals.get(denominator):
            totals[key] = totals[numerator] / totals[denominator]
    return totals


class Recorder:
    """Writes ``metrics.jsonl`` and TensorBoard events (``tensorboard/``) under `folder`; appends.

    A last line that was not written to its end, because the process was killed, is taken away first.

    A line is ``{"step", "time", "generation", key: value …, "nodes": {name: {key: value …}}}`` and is
    flushed, so that a parent can follow the file. `time` is Unix time in seconds. Values that are not
    finite are null: JSON has no others. Where the network was changed since the line before, ``"network"`` is a list
    of ``{"at_s", "change"}``, in seconds since the run's start and in words. Raises `OSError` where the disk does.

    All times and rates are of the wall clock. Under time dilation (`netem.network`) each line says so with
    ``dilation``, and has ``emulated_step_s`` beside ``step_s``: the same on the emulated network's clock.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, *, dilation: float = 1.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._dilation = dilation
        self._clock = clock
        _drop_torn_line(folder / _METRICS)
        self._lines = (folder / _METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def record(self, record: Record) -> None:
        """Write one step."""
        totals = aggregate(record.nodes)
        if self._dilation != 1:
            totals |= {"dilation": self._dilation}
            totals |= {"emulated_step_s": totals["step_s"] / self._dilation} if "step_s" in totals else {}
        now_s = self._clock()
        line: dict[str, Any] = {key: _finite(value) for key, value in totals.items()}
        line = {"step": record.step, "time": round(now_s, 3), "generation": record.generation} | {
            key: value for key, value in line.items() if key not in ("step", "time", "generation", "nodes", "network")
        }
        line["nodes"] = {
            name: {key: _finite(value) for key, value in values.items()} for name, values in record.nodes.items()
        }
        if record.changes:
            line["network"] = [{"at_s": change.at_s, "change": change.text} for change in record.changes]
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        for key, value in totals.items():
            self._board.add_scalar(key, value, global_step=record.step, walltime=now_s)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _combine(key: str, values: list[float]) -> float:
    for ending, rule in _RULES:
        if key.endswith(ending):
            return rule(values)
    return math.fsum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
