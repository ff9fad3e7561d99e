"""Meters for tests, of a node whose machine and steps are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from coordinator.assignment import Assignment
from netem.counters import LinkCounters
from node.exchange.inbox import Members
from node.exchange.wire import Wire
from node.measure.spans import Spans
from node.worker.machine import Machine
from node.worker.meter import Meter, Plan

ALONE = Members(1, Assignment([[0]]), 0, ("node-0",))


def make_meter(
    spans: Spans,
    folder: Path,
    wire: Wire | None = None,
    members: Members = ALONE,
    *,
    links: Callable[[], Mapping[str, LinkCounters]] = dict,
    refused: Callable[[], int] = int,
    peak_flops_per_s: float | None = None,
    flops: Callable[[int], float] = float,
    traced: Iterable[int] = (),
) -> Meter:
    """A meter of a CPU whose peak is `peak_flops_per_s`; traces go to `folder`."""
    machine = Machine(torch.device("cpu"))
    machine.peak_flops_per_s = peak_flops_per_s
    return Meter(spans, wire, links, refused, members, machine, Plan(flops, frozenset(traced), folder))
