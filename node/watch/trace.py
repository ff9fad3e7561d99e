"""One step of a run as a trace that https://ui.perfetto.dev opens: every node's spans and messages on one clock.

The nodes' files are those of `node.measure.trace_file`. The format is the Trace Event Format (JSON): a process for each
node; in it a thread for the trainer, one for the shards of averaging rounds, and one for each link that messages came
by. Flow events lead from the sending of a message to where its reader took it.

Nodes on one host share the monotonic clock. The clock of another host is set so that the Go of the step came to all at
once: what differs by less than the network's latency is then not seen. `otherData` in the file says which it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.records.folder import whole_file
from netem.errors import ConfigError
from node.measure.spans import GO, NO_LAYER, ROOM_SHARD, SEND_SHARD, WAIT_SHARD
from node.measure.trace_file import StepLine

Event = dict[str, Any]

TRAINER, AVERAGING, LINKS = 1, 2, 10
"""Numbers of threads in a node's process; the link from rank r has `LINKS` + r."""

_SHARDS = {kind.name for kind in (SEND_SHARD, WAIT_SHARD, ROOM_SHARD)}
_MICROSECONDS = 1e6

ONE_CLOCK = "one monotonic clock: all nodes are on one host"
SEVERAL_CLOCKS = (
    "the clocks of several hosts, set so that the step's Go came to all nodes at once: differences below the network's "
    "latency are not seen"
)


def write_trace(nodes: Sequence[StepLine], path: Path, run: str) -> None:
    """Write the trace of one step, of which each node has a line. Raises `ConfigError` where the disk does not allow
    it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(trace(nodes, run), separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None


def trace(nodes: Sequence[StepLine], run: str) -> dict[str, Any]:
    """The trace of one step as JSON's values. Times of events are in microseconds from the step's beginning on the
    node that began it first."""
    offsets_s = _offsets_s(nodes)
    events = [event for node in nodes for event in _node_events(node, offsets_s)]
    flows, unpaired = _flows(nodes, offsets_s)
    first_s = min(node.began_s + offsets_s[node.rank] for node in nodes)
    events += flows
    for event in events:
        event["ts"] = round((event["ts"] - first_s) * _MICROSECONDS, 3)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))  # an outer span before those in it
    clocks = {node.clock for node in nodes}
    return {
        "traceEvents": [*(name for node in nodes for name in _names(node, events)), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "run": run,
            "step": nodes[0].step,
            "generation": nodes[0].generation,
            "clock": ONE_CLOCK if len(clocks) == 1 else SEVERAL_CLOCKS,
            "messages without both ends": unpaired,
        },
    }


def _offsets_s(nodes: Sequence[StepLine]) -> dict[int, float]:
    """By rank, what to add to a node's times so that all are on the clock of the first node."""
    by_clock: dict[str, list[StepLine]] = {}
    for node in nodes:
        by_clock.setdefault(node.clock, []).append(node)
    go_s = {clock: min(map(_go_s, sharing)) for clock, sharing in by_clock.items()}
    return {node.rank: go_s[nodes[0].clock] - go_s[node.clock] for node in nodes}


def _go_s(node: StepLine) -> float:
    """When the Go of this step came to the node."""
    return next((span.ended_s for span in node.spans if span.kind == GO.name), node.began_s)


def _node_events(node: StepLine, offsets_s: Mapping[int, float]) -> Iterator[Event]:
    offset_s = offsets_s[node.rank]
    step = {"step": node.step} | {f"{name}_s": round(seconds, 6) for name, seconds in node.accounts_s.items()}
    yield _slice(node.rank, TRAINER, f"step {node.step}", node.began_s + offset_s, node.ended_s + offset_s, step)
    for span in node.spans:
        thread = AVERAGING if span.kind in _SHARDS else TRAINER
        where = {} if span.layer == NO_LAYER else {"layer": span.layer, "pass": span.pass_no}
        yield _slice(node.rank, thread, span.kind, span.began_s + offset_s, span.ended_s + offset_s, where)


def _slice(rank: int, thread: int, name: str, began_s: float, ended_s: float, args: Mapping[str, Any]) -> Event:
    duration_us = round((ended_s - began_s) * _MICROSECONDS, 3)
    shown = f"{name}, layer {args['layer']}" if "layer" in args else name
    place = {"pid": rank, "tid": thread}
    return {"ph": "X", "cat": "span", "name": shown, "ts": began_s, "dur": duration_us, **place, "args": dict(args)}


def _flows(nodes: Sequence[StepLine], offsets_s: Mapping[int, float]) -> tuple[list[Event], int]:
    """Messages: on the reader's links as slices, and as arrows from where they were sent to where they were taken. The
    number of messages of which one end only is known."""
    sent = {
        (message.name, node.rank, message.rank): (message.sent_s + offsets_s[node.rank], message.nbytes)
        for node in nodes
        for message in node.sent
    }
    events: list[Event] = []
    paired = taken = 0
    for node in nodes:
        busy_until_s: dict[int, float] = {}
        for message in sorted(node.taken, key=lambda message: message.arrived_s):
            taken += 1
            key = (message.name, message.rank, node.rank)
            if key not in sent:
                continue
            offset_s = offsets_s[node.rank]
            sent_s, nbytes = sent[key]
            arrived_s, taken_s = message.arrived_s + offset_s, message.taken_s + offset_s
            link = LINKS + message.rank
            # A link carries one message at a time: the slice begins when the one before it had come.
            began_s = min(arrived_s, max(sent_s, busy_until_s.get(link, sent_s)))
            busy_until_s[link] = arrived_s
            args = {"bytes": nbytes, "from_sending_to_arrival_ms": round(1e3 * (arrived_s - sent_s), 3)}
            events.append(_slice(node.rank, link, message.name, began_s, arrived_s, args))
            if sent_s <= taken_s:  # else the clocks of two hosts are further apart than the message took
                paired += 1
                thread = AVERAGING if message.name.startswith("shard") else TRAINER
                events += _arrow(paired, message.name, (message.rank, sent_s), (node.rank, taken_s), thread)
    return events, len(sent) + taken - 2 * paired


def _arrow(
    number: int, name: str, source: tuple[int, float], target: tuple[int, float], thread: int
) -> tuple[Event, Event]:
    same = {"cat": "message", "name": name, "id": number, "tid": thread}
    begins = {"ph": "s", **same, "pid": source[0], "ts": source[1]}
    ends = {"ph": "f", "bp": "e", **same, "pid": target[0], "ts": target[1]}
    return begins, ends


def _names(node: StepLine, events: Sequence[Event]) -> Iterator[Event]:
    """What the node's process and those of its threads that have events are called, and their order."""
    used = sorted({event["tid"] for event in events if event["pid"] == node.rank})
    known = {TRAINER: "trainer", AVERAGING: "averaging"}
    threads = {thread: known.get(thread, f"wire from rank {thread - LINKS}") for thread in used}
    yield _meta(node.rank, 0, "process_name", {"name": f"{node.name} (rank {node.rank})"})
    yield _meta(node.rank, 0, "process_sort_index", {"sort_index": node.rank})
    for thread, name in threads.items():
        yield _meta(node.rank, thread, "thread_name", {"name": name})
        yield _meta(node.rank, thread, "thread_sort_index", {"sort_index": thread})


def _meta(rank: int, thread: int, name: str, args: Mapping[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": rank, "tid": thread, "ts": 0, "args": dict(args)}
