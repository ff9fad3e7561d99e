"""The page of a tunnel: its numbers beside the target's, its networks, its runs, and the differences that remain."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from netem.network import Profile
from netem.tables import markdown_table
from netem.units import format_rate
from node.config import Config, ModelConfig
from node.lab.measured import Measured
from node.lab.plan.model import Model
from node.lab.plan.paper import CENTRALIZED, COMPRESSED, UNCOMPRESSED
from node.lab.plan.text import seconds
from node.lab.tunnel.bench import Bench, body_flops
from node.lab.tunnel.check import TOLERANCE, Verdict
from node.lab.tunnel.design import Design, Goal
from node.lab.tunnel.similitude import Body, Numbers

PAPER = {"centralized": CENTRALIZED, "compressed": COMPRESSED, "uncompressed": UNCOMPRESSED}
PAPER_SETTING = ("paper-800m", 8, 8, 131072)
"""Name, nodes, layers and context of the target for which the paper's tokens/s are shown."""

RUNS = (
    "A run that misses a number is repeated, under a network corrected by its measured compute, bytes and averaging. "
    "The tables show the last run of each mode. Planned: the planner's figure for the target itself."
)


class Part(NamedTuple):
    """One mode: its target, the bench, the tunnel, and the verdict on its last run."""

    goal: Goal
    bench: Bench
    design: Design
    verdict: Verdict | None = None
    earlier: tuple[str, ...] = ()
    """The verdicts on earlier runs, which missed; each led to the network of the next."""


class Facts(NamedTuple):
    """Facts that all modes have in common."""

    target: Config
    small: Config
    device: str
    host: str
    command: str


def document(facts: Facts, parts: Sequence[Part]) -> str:
    """The page, in Markdown."""
    target = facts.target
    ran = any(part.verdict for part in parts)
    about = (
        f"Made by `{facts.command}` on {facts.host}. Target: {target.run.name}, {target.coordinator.nodes} nodes, each "
        f"{facts.device}. Tunnel: {shape_line(facts.small)}, {facts.small.coordinator.nodes} processes. The networks "
        f"are emulated, and nothing runs on the target: times on its clock are times of the tunnel multiplied by the "
        f"ratio of compute. There is one seed, and losses are not compared."
    )
    sections = [
        f"# Wind tunnel: {target.run.name}",
        about,
        "## The numbers\n\nCommunication over compute by layer; latency over a layer's compute; averaging over that of "
        "the steps between.",
        _numbers_table(parts),
        "## The networks",
        _networks_table(parts),
        *(["## The runs", RUNS, _runs_table(facts, parts), "\n".join(_verdicts(parts))] if ran else []),
        "## What is not kept",
        "\n".join(f"- {line}" for line in not_kept(facts, parts)),
    ]
    return "\n\n".join(sections) + "\n"


def as_object(facts: Facts, parts: Sequence[Part]) -> dict[str, Any]:
    """The figures of the page, as an object for JSON."""
    return {
        "target": facts.target.run.name,
        "nodes": facts.target.coordinator.nodes,
        "device": facts.device,
        "host": facts.host,
        "command": facts.command,
        "modes": {part.goal.mode.name: _part(part) for part in parts},
        "not_kept": not_kept(facts, parts),
    }


def verdict_line(part: Part) -> str:
    """Whether the run had the target's numbers, in one line."""
    name = part.goal.mode.name
    if part.verdict is None:
        return f"{name}: not run"
    worst = max(part.verdict.off, key=lambda key: abs(part.verdict.off[key]) if part.verdict else 0.0, default="")
    farthest = f"; farthest is {worst}, {part.verdict.off[worst]:+.1%}" if worst else ""
    if part.verdict.measured.untrusted:
        return f"{name}: MISSED, {part.verdict.measured.untrusted}{farthest}"
    if part.verdict.missed:
        return f"{name}: MISSED, {', '.join(part.verdict.missed)} off by more than {TOLERANCE:.0%}{farthest}"
    return f"{name}: held, every number within {TOLERANCE:.0%} of the target's{farthest}"


def not_kept(facts: Facts, parts: Sequence[Part]) -> list[str]:
    """The differences between the tunnel and its target, with figures."""
    target, small = facts.target.model, facts.small.model
    dense, last = parts[0], parts[-1]
    bodies = (dense.goal.body, dense.bench.body)
    backward = [_backward(body) for body in bodies]
    rest = [1 - 2 * body.layer_s * sum(kind.layers for kind in body.kinds.values()) / body.step_s for body in bodies]
    found = [
        f"backward over forward compute: {backward[0]:.2f} in the target, {backward[1]:.2f} here. Payloads are equal "
        "both ways, so an excess in the forward is made up for by a lack in the backward; their sum is kept",
        f"attention over matrix products of a block of keys: {attention_share(target):.2f} in the target, "
        f"{attention_share(small):.2f} here, in FLOPs; CPUs are slower at attention than this suggests",
        f"evenness (compute of a node, the mean over the fullest): {_evenness(dense.goal):.2f} in the target, "
        f"{dense.bench.evenness:.2f} here",
        f"share of a step outside its layers (embeddings, head, optimizer): {rest[0]:.1%} and {rest[1]:.1%}",
        f"message over segment: a payload of a whole layer is {_segments(last.goal.profile, last.goal.body):,.3g} "
        f"segments in the target, {_segments(last.design.profile, last.design.body):,.3g} here: turns are coarser, and "
        "headers weigh more (they are measured, and corrected for when a run is repeated)",
        f"nodes share this host's cores: the fullest takes {dense.bench.crowding:.2f} times as long when all compute "
        "as alone, and its speed between waits is known only from a run; so each mode has a network of its own",
    ]
    if (devices := facts.target.coordinator.layout.columns) > 1:
        found.append(
            f"devices of a node: {devices} in the target, one here, which stands for all that send at the same time; "
            "what the stages wait for each other is in the target's step, and not in its layers"
        )
    for part in parts:
        made, wanted = part.design.numbers.compared(), part.goal.numbers.compared()
        off = {name: made[name] / wanted[name] - 1 for name in made if wanted[name] > 0}
        found += [
            f"{part.goal.mode.name}, {name}: {share:+.0%} by design, since all kinds of layers share one rate, and "
            "ranks and steps between averagings are whole numbers; a wider small model comes nearer"
            for name, share in off.items()
            if abs(share) > TOLERANCE
        ]
    found += [
        f"{part.goal.mode.name}: transfers took {part.verdict.measured.lateness:.0%} longer than they should have, and "
        "its numbers include that; longer chunks (--small) compute longer, and so allow a slower network"
        for part in parts
        if part.verdict is not None and part.verdict.measured.untrusted
    ]
    if dense.design.sync_every == 1:
        found.append("averaging: gradients are averaged in every step, as in the target, so its share is what it is")
    if any(part.goal.profile.loss for part in parts):
        found.append("lost packets: their share is the target's, but there are far fewer packets")
    return found


def _verdicts(parts: Sequence[Part]) -> list[str]:
    found = []
    for part in parts:
        found += [f"- run {number}, {line}" for number, line in enumerate(part.earlier, 1)]
        found.append(f"- {verdict_line(part)}")
    return found


def attention_share(model: ModelConfig) -> float:
    """FLOPs of one chunk's queries to one chunk's keys, over those of the chunk's matrix products in a layer."""
    queries = model.heads * model.head_size
    products = model.d_model * (2 * model.d_kv + 2 * queries + 3 * model.ffn_dim)
    return 2 * model.chunk_tokens * queries / products


def shape_line(config: Config) -> str:
    """ "8 layers of 128, 8,192 tokens of context in 8 chunks"."""
    model = config.model
    return f"{model.layers} layers of {model.d_model}, {model.context:,} tokens of context in {model.chunks} chunks"


def _numbers_table(parts: Sequence[Part]) -> str:
    ran = any(part.verdict for part in parts)
    rows = []
    for part in parts:
        wanted, made = _flat(part.goal.numbers), _flat(part.design.numbers)
        had = _flat(part.verdict.numbers) if part.verdict else {}
        for name, value in wanted.items():
            row = [part.goal.mode.name, name, f"{value:.4g}", f"{made[name]:.4g}"]
            if ran:
                off = part.verdict.off.get(name) if part.verdict else None
                judged = "" if off is None else f"{off:+.1%}"
                # A run is timed as a whole; only the bench tells how its compute divides between the two ways.
                row += [f"{had[name]:.4g}" if name in had and off is not None else "", judged]
            rows.append(row)
    return markdown_table(["mode", "number", "target", "tunnel", *(["run", "off"] if ran else [])], rows)


def _flat(numbers: Numbers) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, ratio in numbers.kinds.items():
        found |= {f"{name} layer": ratio.both, f"{name} layer, forward": ratio.forward}
        found |= {f"{name} layer, backward": ratio.backward}
    return found | {"latency": numbers.latency, "averaging": numbers.averaging}


def _networks_table(parts: Sequence[Part]) -> str:
    rows = [
        [
            part.goal.mode.name,
            f"{format_rate(part.goal.profile.rate_bps)}, {seconds(part.goal.profile.latency_s)}",
            f"{_rate(part.design.profile)}, {seconds(part.design.profile.latency_s)}",
            "NIC" if part.goal.profile.scope == "nic" else "link",
            f"{seconds(part.goal.body.layer_s)}",
            f"{seconds(part.design.body.layer_s)}",
            f"{part.goal.config.train.sync_every} → {part.design.sync_every}",
        ]
        for part in parts
    ]
    head = ["mode", "target's network", "tunnel's", "rate of each", "target's layer", "tunnel's", "averages every"]
    return markdown_table(head, rows)


def _runs_table(facts: Facts, parts: Sequence[Part]) -> str:
    target = facts.target
    setting = (target.run.name, target.coordinator.nodes, target.model.layers, target.model.context)
    papers = setting == PAPER_SETTING
    rows = []
    for part in parts:
        verdict, goal = part.verdict, part.goal
        if verdict is None:
            continue
        rows.append(
            [
                goal.mode.name,
                str(len(part.earlier) + 1),
                str(verdict.measured.steps),
                seconds(verdict.step_s),
                seconds(verdict.target_step_s),
                f"{verdict.tokens_per_s:,.0f}",
                f"{goal.tokens_per_s:,.0f}",
                f"{verdict.tokens_per_s / goal.tokens_per_s - 1:+.1%}",
                *([f"{PAPER[goal.mode.name]:,.0f}"] if papers else []),
                "held" if verdict.held else "missed",
            ]
        )
    head = ["mode", "runs", "steps", "step, wall clock", "target's clock", "tokens/s there", "planned", "off"]
    return markdown_table([*head, *(["paper"] if papers else []), "numbers"], rows)


def _part(part: Part) -> dict[str, Any]:
    goal, design, verdict = part.goal, part.design, part.verdict
    found: dict[str, Any] = {
        "target": _flat(goal.numbers),
        "tunnel": _flat(design.numbers),
        "target_network": str(goal.profile),
        "rate_scale": design.scale.rate,
        "time_scale": design.scale.time,
        "sync_every": design.sync_every,
        "crowding": part.bench.crowding,
        "planned_tokens_per_s": goal.tokens_per_s,
        "planned_step_s": goal.step_s,
    }
    if verdict is not None:
        found["run"] = {
            "missed_before": list(part.earlier),
            "numbers": verdict.numbers.compared(),
            "off": verdict.off,
            "held": verdict.held,
            "step_s": verdict.step_s,
            "target_step_s": verdict.target_step_s,
            "tokens_per_s": verdict.tokens_per_s,
            "measured": _figures(verdict.measured),
        }
    return found


def _figures(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in measured._asdict().items() if key not in ("name", "config")}


def _backward(body: Body) -> float:
    kinds = body.kinds.values()
    return sum(kind.layers * kind.backward_s for kind in kinds) / sum(kind.layers * kind.forward_s for kind in kinds)


def _evenness(goal: Goal) -> float:
    flops_R = body_flops(Model(goal.config))
    return fmean(flops_R) / max(flops_R)


def _segments(profile: Profile, body: Body) -> float:
    nbytes = max(kind.payload_bytes for kind in body.kinds.values())
    return nbytes / profile.segment_bytes(profile.rate_bps)


def _rate(profile: Profile) -> str:
    return "unlimited" if profile.rate_bps is None else format_rate(float(f"{profile.rate_bps:.3g}"))
