"""The page of a benchmark, and its figures as an object for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles
from typing import Any, NamedTuple

from netem.tables import markdown_table
from node.lab.bench.arms import BASELINE, PeerArm
from node.lab.bench.measure import ArmFigures, Found, Plan, rate_text
from node.lab.plan.text import seconds

UNCOMPRESSED_SHARE, COMPRESSED_SHARE = 0.65, 0.30
"""Targets: a step of ours over one of the all-gather's."""
LOCAL_TIME, LOCAL_MEMORY = 1.03, 1.02
"""Targets: a local step over one of a plain Llama."""
UTILISATION = 0.95


class Facts(NamedTuple):
    """What stands at the head of the page."""

    command: str
    host: str
    shape: str
    date: str


class Target(NamedTuple):
    """One target, and what was measured."""

    what: str
    wanted: str
    value: float
    text: str
    reached: bool


def targets(found: Found) -> list[Target]:
    """The targets that this benchmark has figures for."""
    rows = _arm_targets(found.arms)
    for local in found.local:
        what = f"local step over plain Llama, {local.chunks} chunk{'s' if local.chunks > 1 else ''}"
        rows.append(_at_most(f"{what}: time", local.isthmus_s / local.plain_s, LOCAL_TIME))
        rows.append(_at_most(f"{what}: memory", local.isthmus_bytes / local.plain_bytes, LOCAL_MEMORY))
    for row in found.wire:
        if row.carrier == "isthmus" and row.nbytes == max(each.nbytes for each in found.wire):
            what = f"utilisation of the NIC, {row.pattern}, {row.nbytes / 1e6:g} MB"
            wanted, text = f"≥ {UTILISATION:.0%}", f"{row.utilisation:.1%}"
            rows.append(Target(what, wanted, row.utilisation, text, row.utilisation >= UTILISATION))
    return rows


def _arm_targets(arms: Sequence[ArmFigures]) -> list[Target]:
    """Isthmus against the all-gather with equal numbers on the wire, and all compressed arms against it in float32."""
    by_name = {arm.name: arm for arm in arms}
    rows = []
    for peer, mark in ((BASELINE, "float32"), (PeerArm("gather", "bfloat16"), "bf16")):
        base = by_name.get(peer.name)
        ours = [arm for name, arm in by_name.items() if name.startswith(f"isthmus uncompressed, {mark}")]
        if base is not None and ours:
            best = min(ours, key=lambda arm: arm.step_s)
            rows.append(_at_most(f"{best.name} over {base.name}", best.step_s / base.step_s, UNCOMPRESSED_SHARE))
    base = by_name[BASELINE.name]
    rows += [
        _at_most(f"{arm.name} over {base.name}", arm.step_s / base.step_s, COMPRESSED_SHARE)
        for arm in arms
        if arm.compresses
    ]
    return rows


def _at_most(what: str, value: float, bound: float) -> Target:
    return Target(what, f"≤ {bound:.2f}", value, f"{value:.2f}" if bound < 1 else f"{value:.3f}", value <= bound)


def document(facts: Facts, plan: Plan, found: Found) -> str:
    """The page, in Markdown."""
    about = (
        f"Made by `{facts.command}` on {facts.date}, on {facts.host}. Load average before and after: "
        f"{found.load[0]:.1f} and {found.load[1]:.1f}. {plan.nodes} nodes of one thread each, {facts.shape}. Each node "
        f"is in a network namespace, and the kernel's token bucket (tbf) shapes its NIC to {rate_text(plan.rate_bps)} "
        f"up and down. Ratios compare figures of this one call."
    )
    busy = found.load[0] > found.cores / 2
    sections = [
        "# Isthmus beside its peers",
        about,
        *([_BUSY] if busy else []),
        "## Targets",
        markdown_table(
            ["what", "target", "measured", "reached"],
            [[row.what, row.wanted, row.text, "yes" if row.reached else "no"] for row in targets(found)],
        ),
        "## A training step",
        _ARMS,
        _arms_table(found.arms),
        *[f"Left out: {name}, since it does not work here: {why}." for name, why in found.left_out.items()],
        "## A step without a network",
        _LOCAL,
        _local_table(found),
        "## Messages alone",
        _WIRE,
        _wire_table(found),
    ]
    if found.scaled:
        sections += ["## Scaling", _SCALING, _scaling_table(found)]
    return "\n\n".join(sections) + "\n"


_BUSY = (
    "**This machine had other work before the benchmark began, and probably during it: the figures are noisy, and say "
    "little about an idle one.**"
)
_ARMS = (
    "A step is forward, backward, clipping and the optimizer on the slowest node; no weights are averaged in it. Arms "
    "take turns; the figure is the median over all steps after the cold ones, with the middle half beside it. "
    "all-gather: every rank gets the keys and values of all, and their gradients go back by an all-to-all and a sum; "
    "zigzag: the same with an early and a late chunk for each rank; Ulysses: all-to-all over heads; torch ring: that "
    "of torch itself, whose templates for GPUs are given the CPU's kernel by a shim. All of these use gloo. "
    'Isthmus runs as real `isthmus node` processes with `net.profile = "unshaped"`; "2 passes" is '
    "`train.micro_batches = 2`. equality: the largest distance of a gradient from that of one process, as a share of "
    "the gradient's largest entry (float32 is right up to 2e-6; bf16 rounds). NIC: what the busiest node sends over "
    "its rate, as a mean over the step, with the headers of netem and without those of TCP."
)
_LOCAL = (
    "One process that owns all chunks, uncompressed, against torch's attention over the whole context in a plain Llama "
    "of equal shapes. Memory is the peak of the whole process, of which Python and torch are a large "
    "part, under an allocator that gives freed memory back at once."
)
_WIRE = (
    "Utilisation is what the busiest NIC passed, as the kernel counts it with all headers, over what its rate allows "
    "until the last message has arrived. A bucket that was full at the start lets a short transfer exceed the rate."
)
_SCALING = "One thing is changed at a time. Times are medians of few steps."


def _arms_table(arms: Sequence[ArmFigures]) -> str:
    base_s = next(arm.step_s for arm in arms if arm.name == BASELINE.name)
    rows = []
    for arm in arms:
        low, _, high = quantiles(arm.steps_s, n=4)
        rows.append(
            [
                arm.name,
                seconds(arm.step_s),
                f"{seconds(low)} to {seconds(high)}",
                str(len(arm.steps_s)),
                f"{arm.step_s / base_s:.2f}",
                "" if arm.utilisation is None else f"{arm.utilisation:.0%}",
                "" if arm.off is None else f"{arm.off['gradient']:.1g}",
            ]
        )
    head = ["arm", "step", "middle half", "steps", f"× {BASELINE.name}", "NIC", "equality"]
    return markdown_table(head, rows, align="lrrrrrr")


def _local_table(found: Found) -> str:
    rows = [
        [
            str(local.chunks),
            seconds(local.plain_s),
            seconds(local.isthmus_s),
            f"{local.isthmus_s / local.plain_s:.3f}",
            f"{local.plain_bytes / 1e6:.0f} MB",
            f"{local.isthmus_bytes / 1e6:.0f} MB",
            f"{local.isthmus_bytes / local.plain_bytes:.3f}",
        ]
        for local in found.local
    ]
    head = ["chunks", "plain Llama", "isthmus", "ratio", "plain Llama's memory", "isthmus'", "ratio of memory"]
    return markdown_table(head, rows, align="r")


def _wire_table(found: Found) -> str:
    rows = [
        [
            row.carrier,
            row.pattern,
            f"{row.nbytes / 1e6:g} MB",
            seconds(row.took_s),
            f"{row.payload_share:.1%}",
            f"{row.utilisation:.1%}",
        ]
        for row in found.wire
    ]
    return markdown_table(["carrier", "pattern", "message", "time", "payload", "utilisation"], rows, align="llrrrr")


def _scaling_table(found: Found) -> str:
    names = list(found.scaled[0].step_s)
    rows = [
        [
            str(row.point.nodes),
            f"{row.context:,}",
            rate_text(row.point.rate_bps),
            *(seconds(row.step_s[name]) for name in names),
            *(f"{row.step_s[name] / row.step_s[BASELINE.name]:.2f}" for name in names[1:]),
        ]
        for row in found.scaled
    ]
    head = ["nodes", "context", "NIC", *names, *(f"ratio, {name}" for name in names[1:])]
    return markdown_table(head, rows, align="r")


def as_object(facts: Facts, plan: Plan, found: Found) -> dict[str, Any]:
    """The figures of the page."""
    return {
        **facts._asdict(),
        "nodes": plan.nodes,
        "rate_bps": plan.rate_bps,
        "load_average": found.load,
        "cores": found.cores,
        "targets": [row._asdict() for row in targets(found)],
        "arms": [arm._asdict() | {"step_s": arm.step_s} for arm in found.arms],
        "left_out": found.left_out,
        "local": [row._asdict() for row in found.local],
        "wire": [row._asdict() for row in found.wire],
        "scaling": [{**row.point._asdict(), "context": row.context, "step_s": row.step_s} for row in found.scaled],
    }
