"""Figures that follow from the records of a run (lines of metrics.jsonl): rates, shares, remaining time.

Pure functions of a list of records, the last few for the live view (`node.view`), all of them for the picture
(`node.report`). Nodes of another version may leave keys out, and what was not finite is null: both count as 0, and
what cannot be known is None. What the keys mean is in `node.meter`; how nodes are summed, in `coordinator.recorder`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]

PAYLOADS = ("compressed_bytes", "dense_bytes", "averaging_bytes")

# A longer gap between two records, beside what the step took, is a pause of the run: it was stopped and resumed.
PAUSE_STEPS = 10
PAUSE_S = 60.0


class Compression(NamedTuple):
    """Shares of payload bytes that were not sent, of 1. Averaging is no part of it."""

    all_layers: float
    compressed_layers: float | None
    """Without layers that are sent as they are; None until one is compressed."""


def number(record: Record, key: str) -> float:
    """The value of `key`; 0 where it is missing or null."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def nodes_of(record: Record) -> Mapping[str, Record]:
    """The nodes' own records, by name."""
    nodes = record.get("nodes")
    return nodes if isinstance(nodes, Mapping) else {}


def node_names(records: Sequence[Record]) -> list[str]:
    """Every node that reported, in the order of their names, node-10 after node-9."""
    names = {name for record in records for name in nodes_of(record)}
    return sorted(names, key=lambda name: (len(name), name) if name.startswith("node-") else (math.inf, name))


def total(records: Sequence[Record], key: str, node: str | None = None) -> float:
    """Σ of `key` over all records: the run's, or those of one node."""
    return math.fsum(number(nodes_of(r).get(node, {}) if node is not None else r, key) for r in records)


def durations_s(records: Sequence[Record]) -> list[float]:
    """Wall time of each record's step: since the record before it, or of the step alone for the first and after a
    pause (the steps do not follow on, or the gap is out of all proportion)."""
    durations: list[float] = []
    for index, record in enumerate(records):
        step_s = number(record, "step_s")
        gap_s = number(record, "time") - number(records[index - 1], "time") if index else 0.0
        follows = index > 0 and number(record, "step") == number(records[index - 1], "step") + 1
        fits = 0 < gap_s < PAUSE_STEPS * step_s + PAUSE_S
        durations.append(gap_s if follows and fits else step_s)
    return durations


def step_time_s(records: Sequence[Record]) -> float | None:
    """Mean wall time of a step."""
    elapsed_s = math.fsum(durations_s(records))
    return elapsed_s / len(records) if elapsed_s > 0 else None


def eta_s(records: Sequence[Record], steps: int) -> float | None:
    """Time until step `steps` is done, if the rest goes as fast as `records`."""
    step_s = step_time_s(records)
    if step_s is None:
        return None
    return max(0.0, steps - number(records[-1], "step")) * step_s


def tokens_per_s(records: Sequence[Record]) -> float | None:
    """Tokens of all nodes per second of wall time."""
    return _rate(total(records, "tokens"), records)


def sent_bps(records: Sequence[Record], node: str | None = None) -> float | None:
    """Bits per second that a node (or all together) put on the wire, framing included."""
    return _rate(8 * total(records, "sent_wire_bytes", node), records)


def time_share(records: Sequence[Record], key: str) -> float | None:
    """Share of the steps' time, of 1, that nodes spent on `key` (exposed_s, averaging_s): the mean over nodes."""
    names: Sequence[str | None] = node_names(records) or [None]
    spent_s = math.fsum(total(records, key, name) for name in names)
    step_s = math.fsum(total(records, "step_s", name) for name in names)
    return spent_s / step_s if step_s > 0 else None


def compression(records: Sequence[Record]) -> Compression | None:
    """What compression saved, by counted payload bytes; None where nothing was exchanged.

    `uncompressed_bytes` is what all layers would have sent as they are, `replaced_bytes` that of the compressed ones.
    Steps before compression starts do not count once it has started.
    """
    compressing = [record for record in records if number(record, "compressed_bytes") > 0]
    counted = compressing or records
    compressed_bytes, dense_bytes = total(counted, "compressed_bytes"), total(counted, "dense_bytes")
    uncompressed_bytes = total(counted, "uncompressed_bytes")
    if uncompressed_bytes <= 0:
        return None
    replaced_bytes = total(counted, "replaced_bytes")
    layers = 1 - compressed_bytes / replaced_bytes if replaced_bytes > 0 else None
    return Compression(1 - (compressed_bytes + dense_bytes) / uncompressed_bytes, layers)


def full_context(records: Sequence[Record]) -> list[Record]:
    """The records of steps with the most tokens: those after a warm start at reduced context."""
    most = max((number(record, "tokens") for record in records), default=0.0)
    return [record for record in records if number(record, "tokens") >= most > 0]


def _rate(amount: float, records: Sequence[Record]) -> float | None:
    elapsed_s = math.fsum(durations_s(records))
    return amount / elapsed_s if elapsed_s > 0 else None
