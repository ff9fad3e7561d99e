"""Figures that follow from the records of a run (lines of metrics.jsonl): rates, shares, remaining time.

Pure functions of a list of records, the last few for the live view (`node.watch.view`), all of them for the picture
(`node.watch.report`). Nodes of another version may leave keys out, and what was not finite is null: both count as 0,
and what cannot be known is None. What the keys mean is in `node.worker.meter`; how nodes are summed, in `recorder`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coordinator.events import PER_LAYER, PER_LINK
from netem.verify.promise import TOLERANCE

Record = Mapping[str, Any]

LEAST_MISSED_S = 0.03
"""The least lateness of a link over a whole run that counts: less is within what one second of transfers may miss."""

PAYLOADS = ("compressed_bytes", "dense_bytes", "averaging_bytes")

WINDOW_S = 20.0
"""The present figures of a run are those of its last seconds."""

# A longer gap between two records, beside what the step took, is a pause of the run: it was stopped and resumed.
PAUSE_STEPS = 10
PAUSE_S = 60.0


class Compression(NamedTuple):
    """Shares of payload bytes that were not sent, between 0 and 1. Averaging is not counted."""

    all_layers: float
    compressed_layers: float | None
    """Without layers that are sent as they are; None until one is compressed."""


class MissedLink(NamedTuple):
    """`share` of the time that its messages took, of 1, is this host's lateness."""

    source: str
    target: str
    share: float


class NetworkChange(NamedTuple):
    """What changed in the network, in words, in or before the step that the record is of."""

    step: int
    text: str


class Fault(NamedTuple):
    """What has changed the membership or has cost a step, after `step` steps (`coordinator.events.Fault`)."""

    step: int
    kind: str
    text: str


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


def drop_old(window: deque[Record]) -> int:
    """Drop the records from before the last `WINDOW_S` seconds, but keep two; how many were dropped."""
    dropped = 0
    while len(window) > 2 and number(window[-1], "time") - number(window[0], "time") > WINDOW_S:
        window.popleft()
        dropped += 1
    return dropped


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
    """Share of the steps' time, of 1, that nodes spent on `key` (exposed_s, averaging_s): the mean over nodes.

    Time is counted without held-out evaluations, which would hide in it what training waits for. The shares of the
    other parts of a step add up to 1 (`node.worker.meter` has them).
    """
    names: Sequence[str | None] = node_names(records) or [None]
    spent_s = math.fsum(total(records, key, name) for name in names)
    step_s = math.fsum(total(records, "step_s", name) - total(records, "evaluation_s", name) for name in names)
    return spent_s / step_s if step_s > 0 else None


def exposed_layer(records: Sequence[Record]) -> tuple[int, str, float] | None:
    """The layer and direction that all nodes together waited for longest in the middle of steps, and its share of all
    such waiting, of 1; None where they did not wait."""
    waits_s: dict[tuple[int, str], float] = {}
    for record in records:
        for values in nodes_of(record).values():
            for key in values:
                layer, _, what = key.removeprefix(PER_LAYER).partition("/")
                if key.startswith(PER_LAYER) and layer.isdecimal():
                    way = what.removeprefix("exposed_").removesuffix("_s")
                    waits_s[int(layer), way] = waits_s.get((int(layer), way), 0.0) + number(values, key)
    exposed_s = math.fsum(total(records, "exposed_s", name) for name in node_names(records))
    if not waits_s or exposed_s <= 0:
        return None
    (layer_number, way), longest_s = max(waits_s.items(), key=lambda item: item[1])
    return layer_number, way, longest_s / exposed_s


def compression(records: Sequence[Record]) -> Compression | None:
    """What compression saved, by counted payload bytes; None where nothing was exchanged.

    `uncompressed_bytes` is what all layers would have sent as they are, `replaced_bytes` that of the compressed ones.
    Steps that compress nothing (warm start, unplugged) do not count where others do.
    """
    compressing = [record for record in records if number(record, "compressed_bytes") > 0]
    counted = compressing or records
    saved = saved_in_all_steps(counted)
    if saved is None:
        return None
    replaced_bytes = total(counted, "replaced_bytes")
    layers = 1 - total(counted, "compressed_bytes") / replaced_bytes if replaced_bytes > 0 else None
    return Compression(saved, layers)


def saved_in_all_steps(records: Sequence[Record]) -> float | None:
    """Share of the exchange's payload bytes, of 1, that was not sent, over all layers and all of these steps, whether
    they compress or not; None where nothing was exchanged."""
    uncompressed_bytes = total(records, "uncompressed_bytes")
    if uncompressed_bytes <= 0:
        return None
    return 1 - (total(records, "compressed_bytes") + total(records, "dense_bytes")) / uncompressed_bytes


Link = tuple[str, str]
"""One direction of a pair: who sends, who receives."""


def link_times_s(record: Record) -> dict[Link, tuple[float, float]]:
    """For each link of a record: how long its messages take by the profile, and by how much longer they took."""
    found: dict[Link, tuple[float, float]] = {}
    for name, values in nodes_of(record).items():
        for key in values:
            if key.startswith(PER_LINK):
                peer, _, what = key.removeprefix(PER_LINK).rpartition("/")
                promised_s, missed_s = found.get((name, peer), (0.0, 0.0))
                seconds = number(values, key)
                is_promise = what == "promised_s"
                found[name, peer] = (promised_s + seconds, missed_s) if is_promise else (promised_s, missed_s + seconds)
    return found


def missed_links(records: Sequence[Record]) -> list[MissedLink]:
    """The links whose emulated rate this host did not keep, worst first; empty where the run can be trusted.

    A link's share is taken over all records: by how much longer its messages took than the profile says, divided by
    the time that they took. A link that was late by less than `LEAST_MISSED_S` in all is left out.
    """
    sums: dict[Link, tuple[float, float]] = {}
    for record in records:
        for link, (promised_s, missed_s) in link_times_s(record).items():
            before = sums.get(link, (0.0, 0.0))
            sums[link] = before[0] + promised_s, before[1] + missed_s
    return missed_of(sums)


def missed_of(times_s: Mapping[Link, tuple[float, float]]) -> list[MissedLink]:
    """`missed_links` from the sums of `link_times_s`."""
    found = [
        MissedLink(*link, missed_s / (promised_s + missed_s))
        for link, (promised_s, missed_s) in times_s.items()
        if missed_s >= LEAST_MISSED_S
    ]
    return sorted((link for link in found if link.share > TOLERANCE), key=lambda link: -link.share)


def untrusted(records: Sequence[Record]) -> str | None:
    """Why the run's times are this host's rather than the profile's, in a few words; None where they are not."""
    return untrusted_for(missed_links(records))


def untrusted_for(missed: Sequence[MissedLink]) -> str | None:
    """The same for the links that were missed, worst first."""
    if not missed:
        return None
    worst = missed[0]
    links = "1 link" if len(missed) == 1 else f"{len(missed)} links"
    return (
        f"untrusted: {links} missed the emulated rate by more than {TOLERANCE:.0%}; "
        f"{worst.source} → {worst.target} by {worst.share:.1%}"
    )


def network_changes(records: Sequence[Record]) -> list[NetworkChange]:
    """What was changed in the network while the run went on, in order; steps of traces are not recorded."""
    return [
        NetworkChange(int(number(record, "step")), str(change.get("change", "")))
        for record in records
        if isinstance(changes := record.get("network"), list)
        for change in changes
        if isinstance(change, Mapping)
    ]


def faults(records: Sequence[Record]) -> list[Fault]:
    """The faults, and the nodes that joined later, in order."""
    return [
        Fault(int(number(fault, "step")), str(fault.get("kind", "")), str(fault.get("reason", "")))
        for record in records
        if isinstance(told := record.get("faults"), list)
        for fault in told
        if isinstance(fault, Mapping)
    ]


def skipped_steps(records: Sequence[Record]) -> int:
    """How many steps were not taken because a loss or a gradient was not finite (`train.nonfinite`)."""
    return sum(number(record, "skipped") > 0 for record in records)


def full_context(records: Sequence[Record]) -> list[Record]:
    """The records of steps with the most tokens: those after a warm start at reduced context."""
    most = max((number(record, "tokens") for record in records), default=0.0)
    return [record for record in records if number(record, "tokens") >= most > 0]


def _rate(amount: float, records: Sequence[Record]) -> float | None:
    elapsed_s = math.fsum(durations_s(records))
    return amount / elapsed_s if elapsed_s > 0 else None
