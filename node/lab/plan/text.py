"""A plan in words: its figures, the table of nodes, and the assumptions."""

from __future__ import annotations

from collections.abc import Sequence

from netem.tables import markdown_table
from netem.units import format_rate, format_size
from node.config import Config
from node.lab.plan.assignments import Choice
from node.lab.plan.compare import Curve
from node.lab.plan.costs import Costs
from node.lab.plan.memory import Room
from node.lab.plan.predict import MOST_MESSAGES, Prediction

MOST_NODES = 16
"""Most nodes in the table; of more nodes it has the first, the last, and some between."""


def seconds(value: float) -> str:
    """ "3.21 s", "14 ms": three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.3g} s"


def rate(rate_bps: float | None) -> str:
    """ "490 Mbit/s" in two digits."""
    return (
        "no bandwidth (latency alone exceeds the target)" if rate_bps is None else format_rate(float(f"{rate_bps:.2g}"))
    )


def size(nbytes: float) -> str:
    return format_size(float(f"{nbytes:.3g}")) if nbytes >= 1 else "0 B"


def describe(plan: Prediction) -> str:
    """The plan, some twenty lines."""
    fullest, emptiest = max(plan.compute_s), min(plan.compute_s)
    memory, relayed = plan.memory, ", with payloads relayed" if plan.relays else ""
    lines = [
        f"model:       {plan.parameters / 1e6:,.4g} M parameters, {plan.context:,} tokens of context in {plan.chunks} "
        f"chunks on {plan.nodes} {'node' if plan.nodes == 1 else 'nodes'}; {plan.flops:.3g} FLOPs a step",
        f"network:     {plan.network}",
        *([_site(plan)] if plan.stages * plan.shards > 1 else []),
        f"step:        {seconds(plan.step_s)}, {plan.tokens_per_s:,.0f} tokens/s; "
        f"{plan.utilisation:.1%} of the speed of these devices on a network without limits",
        f"compute:     {seconds(fullest)} on the fullest node, {seconds(emptiest)} on the emptiest (evenness of the "
        f"layers {plan.evenness:.2f}); {seconds(plan.free_s)} a step on a network without limits",
        f"exchange:    {seconds(plan.communication_s)} on its busiest line{relayed}; an ordinary step takes "
        f"{seconds(plan.exchange_step_s)}",
        f"waits:       at most {seconds(max(plan.forward_waits_s))} in the forward of a layer and "
        f"{seconds(max(plan.backward_waits_s))} in its backward, on the node that waits longest"
        + (f"; {plan.passes} passes take turns" if plan.passes > 1 and plan.stages == 1 else ""),
        f"averaging:   {seconds(plan.averaging_s)} a round, {size(plan.averaging_bytes)} sent by each node; "
        f"one round in {plan.sync_every} steps adds {seconds(plan.averaging_s / plan.sync_every)} a step",
        *_across(plan),
        f"exposed:     {seconds(plan.exposed_s)} a step of communication not hidden by compute, averaging included",
        f"bottleneck:  {plan.bottleneck}",
        *(
            f"    {remedy.what + ':':24} {seconds(remedy.step_s)} a step ({remedy.step_s / plan.step_s - 1:+.1%})"
            for remedy in plan.remedies
        ),
        f"memory:      {size(memory.device)} on the fullest device ({_device(plan)}) of "
        f"{size(plan.memory_limit_bytes)}: weights, "
        f"gradients and Adam {size(memory.weights + memory.gradients + memory.adam)}, activations "
        f"{size(memory.activations)}, others' keys and values {size(memory.remote)}, logits {size(memory.logits)}"
        + (f", gathered weights {size(memory.gathered)}" if memory.gathered else "")
        + (f", buffers between stages {size(memory.boundaries)}" if memory.boundaries else "")
        + f"; payloads {size(memory.payloads)} in host memory",
        *([] if plan.fits else [_too_large(plan)]),
        *([f"bandwidth:   for {_needs(plan)} ({_of_what(plan)})"] if plan.bandwidths else []),
        *([_not_searched(plan)] if plan.messages > MOST_MESSAGES else []),
        "",
        _table(plan),
    ]
    return "\n".join(lines)


def choice_lines(choice: Choice) -> list[str]:
    """The candidates for "auto" in `coordinator.assignment` and `relay`, the best in the first line."""
    best = choice.best
    lines = [f"assignment:  auto takes {best.name}; every candidate's step:"]
    for one in choice.candidates:
        counts = ", ".join(map(str, one.config.coordinator.chunks_per_node))
        name = f"{one.name} ({counts})" if counts else one.name
        figures = f"{seconds(one.step_s)} ({one.step_s / best.step_s - 1:+.1%}), evenness {one.evenness:.2f}"
        lines.append(f"    {name + ':':44} {figures}" + ("" if one.room.fits else f"; out: {_shortage(one.room)}"))
    return lines


def _shortage(room: Room) -> str:
    return f"node-{room.rank} needs {size(room.needed.device)} and has {size(room.limit_bytes)}"


def terms(costs: Costs) -> str:
    """All costs except that of matrix products, by name."""
    return (
        f"{costs.element_s * 1e9:.3g} ns a number outside matrix products, {costs.call_s * 1e6:.3g} µs a stage, "
        f"{costs.message_s * 1e6:.3g} µs a message, {costs.byte_s * 1e9:.3g} ns a payload byte, "
        f"{costs.step_s * 1e3:.3g} ms a step"
    )


def assumptions(config: Config, costs: Costs, device: str, source: str, dilation: float) -> list[str]:
    """The assumptions behind the figures."""
    if costs.speeds:
        source = f"{source}; relative speeds {', '.join(f'{speed:.3g}' for speed in costs.speeds)}"
    shared = f"; all nodes share {costs.cores} cores" if costs.cores else ""
    if costs.element_s or costs.call_s:
        compute = [
            f"compute: {costs.flops_per_s / 1e9:.4g} GFLOP/s a {_unit(config)} ({source}); only the memory of {device} "
            "is used",
            f"{terms(costs)}{shared}",
        ]
    else:
        compute = [
            f"compute: {costs.flops_per_s / 1e12:.4g} TFLOP/s a {_unit(config)} ({source}; device {device}); the MFU "
            "includes the time of all that is not a matrix product"
        ]
    return [
        *compute,
        *(
            [f"times are of the wall clock; the emulated network's clock runs {dilation:g} times slower"]
            if dilation != 1
            else []
        ),
        f"{_recomputed(config)}; a device computes one thing at a time, and sends and receives meanwhile; "
        + (
            "a pipeline stage computes one pass at a time"
            if config.coordinator.stages > 1
            else "the passes of a step take turns, layer by layer"
        ),
        *(
            [
                f"devices of a node send to each other at {format_rate(costs.inside_bps)}, each way; together they "
                "share the node's lines (in a run, each process has an emulated line of its own)"
            ]
            if config.coordinator.layout.columns > 1 and costs.inside_bps
            else []
        ),
        "the step has the full context and comes after the warm start; it includes no evaluation, no checkpoint and no "
        "round trip of the barrier",
        "lines have no headers or acknowledgements (under 1 % of large messages), no jitter, no loss, no window and no "
        "slow start; a NIC sends to its links in equal turns, and receives in order of arrival",
        "averaging is a ring in float32 at the speed of its slowest hop, and does not overlap with steps",
        "memory counts tensors, not the allocator's slack or kernels' workspace",
    ]


def _unit(config: Config) -> str:
    return "node" if config.coordinator.layout.columns == 1 else "device"


def _recomputed(config: Config) -> str:
    again = "the backward of a layer computes its activations again, but not its attention"
    return again if config.run.recompute else "no activation is recomputed"


def curves_table(curves: Sequence[Curve], rates_bps: Sequence[float], every: int = 2) -> str:
    """Tokens/s by nodes and bandwidth, as Markdown."""
    chosen = range(0, len(rates_bps), every)
    head = ["tokens/s (utilisation)", *(rate(rates_bps[place]) for place in chosen)]
    rows = [
        [f"{curve.nodes} nodes", *(f"{curve.tokens_per_s[p]:,.0f} ({curve.utilisation[p]:.0%})" for p in chosen)]
        for curve in curves
    ]
    return markdown_table(head, rows)


def contexts_table(plans: Sequence[Prediction]) -> str:
    """Plans by context, as Markdown."""
    head = ["context", "step", "tokens/s", "utilisation", "exposed", "memory", "for 90 %", "bottleneck"]
    rows = [
        [
            f"{plan.context:,}",
            seconds(plan.step_s),
            f"{plan.tokens_per_s:,.0f}",
            f"{plan.utilisation:.1%}",
            seconds(plan.exposed_s),
            size(plan.memory.device) + ("" if plan.fits else ", does not fit"),
            next((rate(need.rate_bps) for need in plan.bandwidths if need.utilisation == 0.9), "none"),
            plan.bottleneck,
        ]
        for plan in plans
    ]
    return markdown_table(head, rows)


def _too_large(plan: Prediction) -> str:
    needed, limit = size(plan.memory.device), size(plan.memory_limit_bytes)
    return (
        f"too large:   the fullest device ({_device(plan)}) needs {needed} and has {limit}; "
        "take more nodes, another --device, or a smaller model.context or train.batch"
    )


def _site(plan: Prediction) -> str:
    """What a node of several devices is."""
    parts = [f"site:        each node has {plan.stages * plan.shards} devices, which share its lines"]
    if plan.stages > 1:
        parts.append(
            f"{plan.stages} pipeline stages, which wait for each other {plan.bubbles:.0%} of a step without limits; "
            f"{size(plan.boundary_bytes)} of activations pass from one to the next in a step"
        )
    if plan.shards > 1:
        parts.append(f"{plan.shards} shards of the weights, each with its part of the contexts")
    return "; ".join(parts)


def _across(plan: Prediction) -> list[str]:
    """Whether it would pay to have stages in different nodes too."""
    if not plan.across:
        return []
    best = min(plan.across, key=lambda way: (not way.fits, way.step_s))
    pays = "pay" if best.fits and best.step_s < plan.step_s else "do not pay"
    lines = [
        f"across:      stages in different nodes {pays}; in {plan.across[0].parts} groups of nodes, one hands "
        f"{size(plan.across[0].boundary_bytes)} of activations to the next for each pass, each way"
    ]
    for way in plan.across:
        name = f"{way.parts} groups of {plan.nodes // way.parts}:"
        too_much = "" if way.fits else "; does not fit its device"
        lines.append(f"    {name:24} {seconds(way.step_s)} a step ({way.step_s / plan.step_s - 1:+.1%}){too_much}")
    return lines


def _not_searched(plan: Prediction) -> str:
    return (
        "not said:    which bandwidth is needed, and whether stages in different nodes would pay: with "
        f"{plan.messages:,} messages a step, a search would take too long"
    )


def _device(plan: Prediction) -> str:
    stage = f", stage {plan.memory_stage}" if plan.stages > 1 else ""
    return f"node-{plan.memory_node}{stage}"


def _needs(plan: Prediction) -> str:
    return ", ".join(f"{need.utilisation:.0%} utilisation {rate(need.rate_bps)}" for need in plan.bandwidths)


def _of_what(plan: Prediction) -> str:
    return (
        f"of each {'NIC' if plan.scope == 'nic' else 'link'}; where rates differ, of the slowest, others in proportion"
    )


def _table(plan: Prediction) -> str:
    count = plan.nodes
    shown = range(count) if count <= MOST_NODES else sorted({*range(0, count, count // 8), count - 1})
    rows, owned = [], [_chunks(chunks) for chunks in plan.owned]
    for rank in shown:
        sent = plan.sent_bytes[rank]
        received = [row[rank] for row in plan.sent_bytes]
        most = max(range(count), key=lambda other: sent[other])
        rows.append(
            [
                f"node-{rank}",
                owned[rank],
                seconds(plan.compute_s[rank]),
                seconds(plan.waited_s[rank]),
                size(sum(sent)),
                size(sum(received)),
                f"{size(sent[most])} to node-{most}" if sent[most] else "none",
            ]
        )
    return markdown_table(["node", "chunks", "computes", "waits", "sends a step", "receives", "its busiest link"], rows)


def _chunks(owned: Sequence[int]) -> str:
    """ "0-3, 12": runs of neighbours."""
    runs: list[list[int]] = []
    for chunk in owned:
        if runs and chunk == runs[-1][-1] + 1:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
