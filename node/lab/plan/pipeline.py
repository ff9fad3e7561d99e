"""One training step of nodes with pipeline stages, simulated event by event.

`simulate` is for nodes of one device, where all do the same at the same time. Here each stage of each node is a process
of its own (`stage_process`), which computes one pass at a time, forward or backward, as torch.distributed.pipelining
does, and then waits for whatever that needs. The keys and values of all stages of a node go over the node's lines,
which they share (`fluid`). Activations and their gradients go from stage to stage: inside a node beside all else, and
between nodes over the same lines.

The shards of a stage do the same at the same time, so one stands for all of them, with the bytes of all.

Shapes: R ranks (nodes with the same stages), S stages, L layers.
"""

from __future__ import annotations

import numpy as np

from node.lab.plan.costs import Costs
from node.lab.plan.lines import Lines
from node.lab.plan.simulate import Outcome, StepWork, with_shared_cores
from node.lab.plan.stage_process import Site, StageProcess
from node.lab.plan.stages import Stages
from node.lab.plan.work import Array


def simulate_stages(step: StepWork, stages: Stages, costs: Costs, lines: Lines) -> Outcome:
    """One step. `lines` are those of all nodes: first those with the first stages, one for each rank, then the next."""
    shape = len(stages.layers), step.assignment.n_ranks

    def attempt(slower: Array) -> tuple[Outcome, list[Array]]:
        return _attempt(step, stages, costs, lines, slower.reshape(shape))

    return with_shared_cores(shape[0] * shape[1], costs, attempt)


def _attempt(
    step: StepWork, stages: Stages, costs: Costs, lines: Lines, slower_SR: Array
) -> tuple[Outcome, list[Array]]:
    """The outcome where each device takes so many times as long, and when each computes."""
    count, ranks = slower_SR.shape
    site = Site(step, stages, costs, lines, slower_SR)
    processes = [StageProcess(site, stage, rank) for stage in range(count) for rank in range(ranks)]
    for process in processes:
        site.clock.start(process.run())
    site.clock.run()
    ends_SR, busy_SR, bubbles_SR = (
        np.array([getattr(process, name) for process in processes]).reshape(count, ranks)
        for name in ("ends_s", "busy_s", "bubbles_s")
    )
    assert (ends_SR > 0).all(), "a stage waits for what never comes"
    outcome = Outcome(
        step_s=float(ends_SR.max()),
        ends_s=ends_SR.max(0),
        busy_s=busy_SR.max(0),
        waits_s=site.waits_s,
        sent_bytes=site.network.sent_bytes,
        devices_busy_s=busy_SR,
        bubbles_s=bubbles_SR,
    )
    return outcome, [np.array(process.spans) for process in processes]
