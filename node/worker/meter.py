"""Metrics of a node beside its loss: where its time goes, traffic by use, and the process itself.

`step_s` is a step's wall time on a node, from the end of the step before: waiting for its Go, the step, and what
follows it. On each node it is the sum of

    compute_s      all that is none of the others
    exposed_s      waiting for the network in the middle of a step: exposed_forward_s (for payloads, and for room to
                   send them) + exposed_backward_s (the same of gradients)
    averaging_s    averaging rounds
    checkpoint_s   writing a checkpoint
    barrier_s      waiting for Go: for the slowest node, and for the coordinator's word
    evaluation_s   the held-out evaluation, with what it waits

`layer/3/exposed_forward_s` and the like give the layers that a node waits for longest: those with `LEAST_SHARE` of the
step or more, so a record never has many. `flops_per_s` is the model's FLOPs of the node's chunks over `compute_s`, by
which the coordinator finds slow nodes. `mfu` is the model's FLOPs (`node.measure.flops`) over what the device could
have done in the step, its evaluation and checkpoint left out; it is there where the device's peak is known.
`memory_peak_bytes` is the most so far, of the GPU or else of the process.

The wire and the endpoint keep totals of bytes; the meter turns them into figures of one step. `uncompressed_bytes` are
the bytes that the same exchange would have sent with whole K and V (in bfloat16, or in float32 where the run sends
nothing else: `PayloadFormat.uncompressed_bytes`); `replaced_bytes` is the part of them that belongs to the compressed
layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from coordinator.events import PER_LAYER, PER_LINK, REFUSED_CONNECTIONS
from coordinator.pace import SPEED
from netem.counters import LinkCounters
from netem.names import plain
from node.exchange.inbox import Members
from node.exchange.wire import Wire
from node.measure.profile import StepProfiler
from node.measure.spans import ACCOUNTS, Spans, StepTime
from node.measure.trace_file import append_step
from node.worker.machine import Machine

log = logging.getLogger("isthmus.meter")

USES = ("compressed", "dense", "averaging", "evaluation")
"""The uses of payload bytes: layers that compress, layers that do not, averaging rounds, and passes without gradients
(held-out evaluation, and the calibration of the basis)."""

LEAST_SHARE = 0.01
"""Waiting for a layer in one direction is reported on its own if it takes this share of the step."""


class Plan(NamedTuple):
    """What a meter knows of the steps to come."""

    flops: Callable[[int], float]
    """The model's FLOPs of this node in a step, by its number."""
    traced: frozenset[int]
    """The steps that are recorded."""
    run_folder: Path
    """Where the traces are written."""
    profiled: frozenset[int] = frozenset()
    """The steps that torch's profiler records."""


class Meter:
    """Measures one step after another, in one world. `links` gives the endpoint's totals by peer, and `refused` the
    number of connections that it has closed at its door."""

    def __init__(
        self,
        spans: Spans,
        wire: Wire | None,
        links: Callable[[], Mapping[str, LinkCounters]],
        refused: Callable[[], int],
        members: Members,
        machine: Machine,
        plan: Plan,
    ) -> None:
        self._spans = spans
        self._wire = wire
        self._links = links
        self._refused = refused
        self._refused_before = refused()
        self._members = members
        self._machine = machine
        self._plan = plan
        self._step = 0
        self._profiler = StepProfiler(plan.profiled, plan.run_folder, members.rank)
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._before = self._totals()

    def begin(self, step: int) -> None:
        """Step `step` begins now, with the wait for its Go."""
        self._step = step
        self._profiler.begin(step)
        self._spans.begin(recorded=step in self._plan.traced)

    def close(self) -> None:
        """End what is still recorded: the generation is over."""
        self._profiler.end()

    def step_metrics(self) -> dict[str, float]:
        """What was measured in the step that ends now; the next one begins. The state of the process is that of now."""
        time = self._spans.end()
        step = self._step
        self.begin(step + 1)
        if time.record is not None:
            self._write_trace(step, time)
        now = self._totals()
        grown = {key: value - self._before.get(key, 0.0) for key, value in now.items()}
        self._before = now
        grown |= self._newly_refused()
        return grown | self._process_now() | _times(time) | self._speed(step, time) | self._mfu(step, time)

    def _write_trace(self, step: int, time: StepTime) -> None:
        try:
            append_step(self._plan.run_folder, self._members, step, time)
        except OSError as error:  # the training is worth more than its trace
            log.warning("run.trace: step %d of %s cannot be written: %s", step, self._plan.run_folder, error.strerror)

    def _newly_refused(self) -> dict[str, float]:
        new, self._refused_before = self._refused() - self._refused_before, self._refused()
        return {REFUSED_CONNECTIONS: float(new)} if new else {}

    def _process_now(self) -> dict[str, float]:
        return {
            "cpu_percent": self._process.cpu_percent(),
            "rss_bytes": float(self._process.memory_info().rss),
            "memory_peak_bytes": self._machine.memory_peak_bytes(),
            "lateness_s": max((link.lateness_max_s for link in self._links().values()), default=0.0),
        }

    def _speed(self, step: int, time: StepTime) -> dict[str, float]:
        compute_s = time.accounts_s["compute"]
        return {SPEED: self._plan.flops(step) / compute_s} if compute_s > 0 else {}

    def _mfu(self, step: int, time: StepTime) -> dict[str, float]:
        training_s = time.total_s - time.accounts_s["evaluation"] - time.accounts_s["checkpoint"]
        if self._machine.peak_flops_per_s is None or training_s <= 0:
            return {}
        return {"mfu": self._plan.flops(step) / (training_s * self._machine.peak_flops_per_s)}

    def _kept(self) -> dict[str, float]:
        """How well this host kept each link's rate, for `coordinator.records.rates.missed_links`."""
        shaped = [(plain(peer), link) for peer, link in self._links().items() if link.promised_s]
        promised = {f"{PER_LINK}{peer}/promised_s": link.promised_s for peer, link in shaped}
        return promised | {f"{PER_LINK}{peer}/missed_s": link.missed_s for peer, link in shaped}

    def _totals(self) -> dict[str, float]:
        links = self._links().values()
        sent = self._wire.sent_bytes if self._wire else {}
        payload = {f"{use}_bytes": float(sent.get(use, 0)) for use in USES}
        return (
            payload
            | self._kept()
            | {
                "uncompressed_bytes": float(sent.get("uncompressed", 0)),
                "replaced_bytes": float(sent.get("replaced", 0)),
                "sent_wire_bytes": float(sum(link.wire_bytes for link in links)),
                "received_wire_bytes": float(sum(link.received_wire_bytes for link in links)),
                "resent_bytes": float(sum(link.resent_bytes for link in links)),
            }
        )


def _times(time: StepTime) -> dict[str, float]:
    accounts = {f"{name}_s": seconds for name, seconds in time.accounts_s.items()}
    layers = {
        f"{PER_LAYER}{layer}/{ACCOUNTS[account]}_s": seconds
        for (account, layer), seconds in sorted(time.waits_s.items())
        if seconds >= LEAST_SHARE * time.total_s and layer >= 0
    }
    exposed_s = accounts["exposed_forward_s"] + accounts["exposed_backward_s"]
    return {"step_s": time.total_s, "exposed_s": exposed_s} | accounts | layers
