"""A run as it is shown: what it has written (metrics.jsonl and config.toml), and its figures in a few lines.

Where a resumed run did steps again, the later ones count, and the pause between is left out of its wall-clock. The
figures are those of `coordinator.records.rates`; `coordinator.records.folder` names the files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.records import rates
from coordinator.records.folder import CONFIG, METRICS
from coordinator.records.metrics import describe_steps, missing_steps, read_records, without_repeats
from coordinator.records.rates import Record, number
from netem.config import convert, load_toml
from netem.errors import ConfigError
from netem.profile import NetConfig, resolve_schedule
from netem.units import format_size
from node.watch.view import describe_network, format_duration

# Where the time of steps went: a label and the key in the records.
TIMES = (
    ("compute", "compute_s"),
    ("exposed communication forward", "exposed_forward_s"),
    ("backward", "exposed_backward_s"),
    ("averaging", "averaging_s"),
    ("checkpoints", "checkpoint_s"),
    ("barrier", "barrier_s"),
)
MOST_CHANGES = 4


@dataclass(frozen=True)
class RunRecords:
    """One run as it is drawn. `elapsed_s` is the wall-clock at the end of each record's step, without pauses."""

    name: str
    records: list[Record]
    elapsed_s: list[float]
    network: str
    mode: str
    dilation: float
    """Wall-clock seconds in one second of the emulated network (`netem.network`)."""


def read_run(folder: Path) -> RunRecords:
    """Read a run's files. Raises `ConfigError` where there is no run, or none of its steps is recorded yet."""
    path = folder / METRICS
    records: list[Record] = [*without_repeats(read_records(path))]
    if not any(isinstance(record.get("loss"), int | float) for record in records):
        raise ConfigError(f"{path}: holds no step with a loss; there is nothing to draw yet")
    elapsed_s = list(itertools.accumulate(rates.durations_s(records)))
    tree = _config_tree(folder / CONFIG)
    # A run that let tokens know of later ones says so wherever it is named: its losses do not compare.
    mark = " (leaks)" if any(number(record, "leaks") for record in records) else ""
    mark += " (untrusted)" if rates.untrusted(records) else ""
    return RunRecords(folder.resolve().name + mark, records, elapsed_s, _network(tree), _mode(tree), _dilation(tree))


def caption(run: RunRecords) -> str:
    """The run in a few lines: steps, bytes, waiting, the network, and whether the emulated network kept its rates."""
    records = run.records
    steps, nodes = int(number(records[-1], "step")), rates.node_names(records)
    done = f"{steps} steps, {rates.total(records, 'tokens'):,.0f} tokens in {format_duration(run.elapsed_s[-1])}"
    tokens_per_s = rates.tokens_per_s(rates.full_context(records)) or 0.0
    parts = [done, f"{speed(tokens_per_s, run)} tokens/s at full context"]
    if run.dilation != 1:
        parts[0] += f" (emulated: {run.elapsed_s[-1] / run.dilation:,.1f} s)"
    if nodes:
        each = rates.total(records, "sent_wire_bytes") / len(nodes)
        parts.append(f"{format_size(each)} sent per node ({len(nodes)} nodes)")
    saved, more = rates.compression(records), []
    if saved is not None and saved.compressed_layers is not None:
        more.append(
            f"payload bytes saved by compression: {saved.compressed_layers:.1%} in compressed layers, "
            f"{saved.all_layers:.1%} over all layers, {rates.saved_in_all_steps(records) or 0:.1%} over all steps"
        )
    if skipped := rates.skipped_steps(records):
        more.append(f"steps skipped, not finite: {skipped}")
    if gaps := missing_steps(records, steps):
        more.append(f"steps without a record: {describe_steps(gaps)}")
    how = f"mode {run.mode}, network {run.network}" if run.mode else f"network {run.network}"
    lines = [" · ".join(parts), " · ".join(more), _times(records), how, _network_changes(records), _faults(records)]
    return "\n".join(line for line in [*lines, rates.untrusted(records)] if line)


def _times(records: Sequence[Record]) -> str:
    """Where the nodes' time went, evaluations left out, and on a line of its own what else they measured."""
    shares = [(label, rates.time_share(records, key)) for label, key in TIMES]
    shown = ", ".join(f"{label} {share:.1%}" for label, share in shares if share)
    spent = f"time of a step: {shown}" if shown else ""
    parts = []
    if longest := rates.exposed_layer(records):
        layer, way, share = longest
        parts.append(f"longest waits: layer {layer}, {way} ({share:.0%} of the exposed)")
    if mfus := [number(record, "mfu") for record in rates.full_context(records) if "mfu" in record]:
        parts.append(f"MFU {math.fsum(mfus) / len(mfus):.1%}")
    if peak_bytes := max(number(record, "memory_peak_bytes") for record in records):
        parts.append(f"memory at most {format_size(peak_bytes)} a node")
    return "\n".join(line for line in (spent, " · ".join(parts)) if line)


def _network_changes(records: Sequence[Record]) -> str:
    """The first few; all of them are in the records."""
    changes = rates.network_changes(records)
    shown = [f"step {change.step}: {change.text}" for change in changes[:MOST_CHANGES]]
    more = [f"{len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
    return f"network changed: {'; '.join(shown + more)}" if changes else ""


def _faults(records: Sequence[Record]) -> str:
    """As `_network_changes`; all of them are in faults.jsonl."""
    found = rates.faults(records)
    shown = [f"step {fault.step}: {fault.text}" for fault in found[:MOST_CHANGES]]
    more = [f"{len(found) - MOST_CHANGES} more"] if len(found) > MOST_CHANGES else []
    return f"nodes: {'; '.join(shown + more)}" if found else ""


def _config_tree(path: Path) -> dict[str, Any]:
    """The run's config as it was written, by whatever version; empty where there is none."""
    return load_toml(path) if path.exists() else {}


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name, {})
    return section if isinstance(section, dict) else {}


def _mode(tree: dict[str, Any]) -> str:
    """What is sent, and in which steps it is not compressed."""
    compress = _section(tree, "compress")
    parts = [str(compress.get("mode", ""))]
    if parts == ["subspace"]:
        warmup_steps, unplug_step = compress.get("warmup_steps"), compress.get("unplug_step")
        parts += [f"warm start up to step {warmup_steps}"] if warmup_steps else []
        parts += [f"unplugged after step {unplug_step}"] if unplug_step else []
    return ", ".join(parts)


def _dilation(tree: dict[str, Any]) -> float:
    dilation = _section(tree, "net").get("dilation", 1.0)
    return float(dilation) if isinstance(dilation, int | float) and 0 < dilation < math.inf else 1.0


def speed(tokens_per_s: float, run: RunRecords) -> str:
    """Tokens a second by the wall clock, and where another clock is emulated, by that too."""
    text = f"{tokens_per_s:,.0f}"
    return text if run.dilation == 1 else f"{text} (emulated: {tokens_per_s * run.dilation:,.0f})"


def _network(tree: dict[str, Any]) -> str:
    if "net" not in tree:
        return "not recorded"
    try:
        return describe_network(resolve_schedule(convert(NetConfig, tree["net"], "net")))
    except ConfigError:  # the profile's own file may be gone by now
        return f"emulated {_section(tree, 'net').get('profile')}"
