"""What the nodes measured, as files: one JSON object a step, and TensorBoard events.

`aggregate` is the rule that turns the nodes' values into the run's: sums, extremes, means, and losses per
token. The recorder knows keys only by their endings (units, mostly), and nothing of training. `run` says
when to record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from coordinator.events import DISK, PER_LAYER, PER_LINK, Fault, Record
from coordinator.messages import COORDINATOR
from coordinator.records.board import Board
from coordinator.records.folder import FAULTS, METRICS
from coordinator.records.line_file import FULL, LineFile
from coordinator.records.metrics import cut_torn_line, describe_steps, missing_steps, read_records

log = logging.getLogger("isthmus.coordinator")

# A loss is per token of all nodes: Σ numerator / Σ denominator.
LOSSES: Final = {
    "loss": ("loss_sum", "tokens"),
    "heldout_loss": ("heldout_loss_sum", "heldout_tokens"),
}
# The first ending that fits decides; a key without such an ending is averaged.
_RULES: Final[tuple[tuple[str, Callable[[list[float]], float]], ...]] = (
    ("_peak_bytes", max),
    ("_bytes", math.fsum),
    ("tokens", math.fsum),
    ("_sum", math.fsum),
    ("_connections", math.fsum),
    ("_per_s", math.fsum),
    ("_bps", math.fsum),
    ("_s", max),  # a step takes as long as its slowest node
)


def aggregate(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One value a key over all nodes that report it.

    Sums of bytes, tokens, connections, sums and rates; the maximum of times (``_s``) and of peaks; means of all else;
    NaN where a node's value is not finite. `LOSSES` are added where their parts are there and the denominator is not 0.
    Keys of single links and layers are left out.
    """
    keys = sorted({key for values in nodes.values() for key in values if not key.startswith((PER_LAYER, PER_LINK))})
    totals = {key: _combine(key, [values[key] for values in nodes.values() if key in values]) for key in keys}
    for key, (numerator, denominator) in LOSSES.items():
        if numerator in totals and totals.get(denominator):
            totals[key] = totals[numerator] / totals[denominator]
    return totals


class Recorder:
    """Writes ``metrics.jsonl`` and TensorBoard events (``tensorboard/``) under `folder`; appends.

    `done` is how many steps were done before. A last line that was not written to its end, because the process was
    killed, is cut off, and `missing` names the steps up to `done` that have no record. Raises `ConfigError` where
    metrics.jsonl holds something else than records, `OSError` where the disk fails or the folder is no longer there. A
    full disk is no failure: records wait in memory (`LineFile`), and it is told as a fault.

    A line is ``{"step", "time", "generation", key: value …, "nodes": {name: {key: value …}}}`` and is
    flushed, so that a parent can follow the file. `time` is Unix time in seconds. Values that are not
    finite are null: JSON has no others. Where the network was changed since the line before, ``"network"`` is a list
    of ``{"at_s", "change"}``, in seconds since the run's start and in words. Where there
    were faults, ``"faults"`` is a list of them (`fault`).

    All times and rates are of the wall clock. Under time dilation (`netem.network`) each line says so with
    ``dilation``, and has ``emulated_step_s`` beside ``step_s``: the same on the emulated network's clock.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, *, done: int = 0, dilation: float = 1.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._dilation = dilation
        self._clock = clock
        self._path = folder / METRICS
        before = read_records(self._path) if self._path.exists() else []
        cut_torn_line(self._path)
        self.missing = describe_steps(missing_steps(before, done))
        self._faults = 0
        self._untold: list[dict[str, Any]] = []
        self._lines = LineFile(self._path)
        self._lines.open()
        self._fault_lines = LineFile(folder / FAULTS)
        self._board: Board | None = Board(folder / "tensorboard", done + 1, clock())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def record(self, record: Record) -> dict[str, Any]:
        """Write one step. Returns what the line holds."""
        totals = aggregate(record.nodes)
        totals |= {key: totals.get(key, 0.0) + count for key, count in record.refused.items()}
        if self._dilation != 1:
            totals |= {"dilation": self._dilation}
            totals |= {"emulated_step_s": totals["step_s"] / self._dilation} if "step_s" in totals else {}
        now_s = self._clock()
        line: dict[str, Any] = {key: _finite(value) for key, value in totals.items()}
        line = {"step": record.step, "time": round(now_s, 3), "generation": record.generation} | {
            key: value
            for key, value in line.items()
            if key not in ("step", "time", "generation", "nodes", "network", "faults")
        }
        line["nodes"] = {
            name: {key: _finite(value) for key, value in values.items()} for name, values in record.nodes.items()
        }
        if record.changes:
            line["network"] = [{"at_s": change.at_s, "change": change.text} for change in record.changes]
        if self._untold:
            line["faults"], self._untold = self._untold, []
        self._check_there()
        waited = self._lines.waiting
        self._lines.add(json.dumps(line, allow_nan=False))
        self._fault_lines.flush()
        self._draw(totals, record.step, now_s)
        self._tell_of_room(waited, record)
        return line

    def fault(self, fault: Fault) -> None:
        """Write one fault: a line of ``faults.jsonl``, which is also in the next record, and how many there were up to
        its step for TensorBoard.

        `since` and `time` are Unix times: of when it began, as far as that is known, and of when the run had gone on.
        """
        now_s = self._clock()
        line = fault._asdict() | {
            "nodes": list(fault.nodes),
            "since": round(now_s - fault.cost_s - fault.unseen_s, 3),
            "time": round(now_s, 3),
            "cost_s": round(fault.cost_s, 3),
            "unseen_s": round(fault.unseen_s, 3),
        }
        self._fault_lines.add(json.dumps(line))
        self._untold.append(line)
        self._faults += 1
        self._draw({"faults": float(self._faults)}, fault.step, now_s)

    def close(self) -> None:
        """Flush and close all. What a full disk does not take is lost, which the log says."""
        if self._lines.waiting:
            log.warning("%s: the disk is full: the last %d steps have no record", self._path, self._lines.waiting)
        self._lines.close()
        self._fault_lines.close()
        self._close_board()

    def _draw(self, values: Mapping[str, float], step: int, now_s: float) -> None:
        """Write TensorBoard's events. A full disk leaves a gap: a new file begins once there is room."""
        try:
            if self._board is None and not self._lines.waiting:
                self._board = Board(self._path.parent / "tensorboard", step, now_s)
            if self._board is not None:
                self._board.add(values, step, now_s)
        except OSError as error:
            if error.errno not in FULL:
                raise OSError(error.errno, error.strerror, str(self._path.parent)) from None
            self._close_board()

    def _close_board(self) -> None:
        board, self._board = self._board, None
        try:
            if board is not None:
                board.close()
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _tell_of_room(self, waited: int, record: Record) -> None:
        """Say once that the disk is full, and once that there is room again."""
        if self._lines.waiting and not waited:
            reason = f"the coordinator's disk is full ({self._path.parent})"
            done = "training goes on, and the steps are recorded once there is room"
            log.warning("after step %d: %s; %s", record.step, reason, done)
            self.fault(Fault(DISK, (COORDINATOR,), reason, record.step, record.generation, 0.0, done=done))
        elif waited and not self._lines.waiting:
            gone = f"; {self._lines.lost} steps have no record" if self._lines.lost else ""
            log.warning("after step %d: the coordinator's disk has room again%s", record.step, gone)

    def _check_there(self) -> None:
        """A file that was deleted can still be written to, and nobody would see what is."""
        try:
            same = os.path.samestat(self._path.stat(), os.fstat(self._lines.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise FileNotFoundError(f"{self._path} was deleted or moved while the run went on")


def _combine(key: str, values: list[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        for ending, rule in _RULES:
            if key.endswith(ending):
                return rule(values)
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
