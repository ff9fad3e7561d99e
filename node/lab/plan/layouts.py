"""Layouts of the paper's 3B model, planned: `python -m node.lab.plan.layouts` writes docs/netem/layouts.md.

The paper's Figure 3 trains it on 32 GPUs by pipeline and context parallelism. Here its GPUs are dealt to nodes and
pipeline stages in several ways, on networks wide and narrow. Then a million tokens on 64 GPUs, and stages that lie in
different nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from netem.network import Scope
from netem.profile import resolve
from netem.tables import markdown_table
from netem.units import format_size
from node.config import Config, load_config
from node.exchange.payload import link_bytes
from node.lab.plan.costs import MFU, stated
from node.lab.plan.lines import Lines, lines_of
from node.lab.plan.memory import tightest
from node.lab.plan.model import Model
from node.lab.plan.predict import bubbles, unlimited
from node.lab.plan.text import seconds, size
from node.measure.devices import device, devices

CONFIG = Path("configs/paper-3b.toml")
DOCUMENT = Path("docs/netem/layouts.md")
GPUS = 32
STAGES = (1, 2, 4, 8)
NARROW, WIDE = ("--net.rate=300 Mbit/s", "--net.latency=25 ms"), ("--net.rate=100 Gbit/s", "--net.latency=50 us")
COSTS = stated(device("a100"), MFU)
SCOPES: tuple[Scope, ...] = ("link", "nic")


class Mode(NamedTuple):
    """What is sent, over which network."""

    name: str
    settings: tuple[str, ...]
    scope: Scope


CENTRALIZED = Mode("centralized", ("--compress.mode=dense", *WIDE), "nic")
MODES = (
    CENTRALIZED,
    *(Mode("compressed", NARROW, scope) for scope in SCOPES),
    *(Mode("last layer too", ("--compress.dense_last_layers=0", *NARROW), scope) for scope in SCOPES),
    *(Mode("uncompressed", ("--compress.mode=dense", *NARROW), scope) for scope in SCOPES),
)


def config_of(nodes: int, stages: int, mode: Mode, *more: str) -> Config:
    """The model with a chunk on each node."""
    dealt = (f"--coordinator.nodes={nodes}", f"--coordinator.stages={stages}", f"--model.chunks={nodes}")
    fixed = ("--coordinator.address=tcp://127.0.0.1:0", "--net.profile=unshaped", f"--net.scope={mode.scope}")
    return load_config(CONFIG, [*fixed, *mode.settings, *dealt, *more])


def network_of(config: Config) -> Lines:
    """The lines between its nodes."""
    return lines_of(resolve(config.net), config.coordinator.nodes)


def speed_row(stages: int) -> list[str]:
    """Tokens/s of one layout in all modes, as cells."""
    models = [(mode, Model(config_of(GPUS // stages, stages, mode))) for mode in MODES]
    speeds = [model.tokens / model.step_s(COSTS, network_of(model.config)) for _, model in models]
    return [f"{GPUS // stages} × {stages}", *(f"{speed:,.0f}" for speed in speeds)]


def layout_row(stages: int) -> list[str]:
    """What a layout asks for, as cells: compressed, on a network without limits."""
    model = Model(config_of(GPUS // stages, stages, MODES[1]))
    dense = Model(config_of(GPUS // stages, stages, MODES[-1]))
    free = model.simulate(COSTS, unlimited(network_of(model.config)))
    room = tightest(model, devices("a100", model.layout.sites))
    of_stage = f", stage {room.stage}" if stages > 1 else ""
    boundary = model.step.passes * float(model.stages.boundary_bytes.max()) if stages > 1 else 0.0
    return [
        f"{GPUS // stages} × {stages}",
        f"{model.config.model.chunk_tokens:,}",
        f"{bubbles(free):.0%}",
        f"{size(room.needed.device)} (node-{room.rank}{of_stage})" + ("" if room.fits else ", too much"),
        size(boundary),
        size(_most_sent(model)),
        size(_most_sent(dense)),
        size(model.averaging_bytes()),
    ]


def _rate_of_each(mode: Mode) -> str:
    if mode == CENTRALIZED:
        return ""
    return ", link" if mode.scope == "link" else ", NIC"


def _most_sent(model: Model) -> float:
    """Bytes of keys, values and gradients that the node which sends most sends in a step, by the wire's formula."""
    return max(map(sum, sent_bytes(model)))


def sent_bytes(model: Model) -> list[list[int]]:
    """Bytes of a step from node to node, by the formula to which the wire is held."""
    columns_passes = model.layout.shards * model.step.passes
    by_kind = link_bytes(model.payload, model.config.assignment(), model.spec)
    ranks = range(model.layout.sites)
    return [[columns_passes * sum(kind[one][other] for kind in by_kind) for other in ranks] for one in ranks]


class Million(NamedTuple):
    """A way to give a million tokens of context to 64 GPUs."""

    nodes: int
    stages: int
    passes: int

    def model(self, mode: Mode) -> Model:
        batch = (f"--train.batch={self.passes}", f"--train.micro_batches={self.passes}")
        return Model(config_of(self.nodes, self.stages, mode, "--model.context=1048576", *batch))


MILLIONS = (Million(64, 1, 1), Million(16, 4, 4))
MILLION_MODES = MODES[1:3] + MODES[5:]


def million_row(way: Million, mode: Mode) -> list[str]:
    """A million tokens of context on 64 GPUs, as cells."""
    model = way.model(mode)
    sent = sent_bytes(model)
    outcome = model.simulate(COSTS, network_of(model.config))
    room = tightest(model, devices("a100", way.nodes))
    return [
        f"{way.nodes} × {way.stages}",
        mode.name,
        "link" if mode.scope == "link" else "NIC",
        f"{sum(map(sum, sent)):,}",
        f"{max(map(sum, sent)):,}",
        seconds(outcome.step_s),
        f"{model.tokens / outcome.step_s:,.0f}",
        size(room.needed.device) + ("" if room.fits else ", too much"),
    ]


PARTS = (1, 2, 4, 8)


def across_row(parts: int, mode: Mode) -> list[str]:
    """Eight nodes of one GPU, whose layers are dealt to so many groups of nodes, as cells."""
    model = Model(config_of(8, 1, mode), parts)
    outcome = model.simulate(COSTS, network_of(model.config))
    room = tightest(model, devices("a100", 8))
    return [
        f"{8 // parts} × {parts}",
        mode.name,
        "link" if mode.scope == "link" else "NIC",
        size(outcome.sent_bytes.sum(1).max()),
        seconds(outcome.step_s),
        f"{model.tokens / outcome.step_s:,.0f}",
        size(room.needed.device) + ("" if room.fits else ", too much"),
    ]


def document() -> str:
    """The whole page."""
    config = config_of(8, 4, MODES[1])
    model = Model(config)
    layers = config.model.layers
    boundary_bytes = float(model.stages.boundary_bytes.max()) / 2  # here in float32, between nodes in bfloat16
    sizes = {"boundary": boundary_bytes, "payload": model.payload_bytes(0), "whole": model.payload_bytes(layers - 1)}
    facts = {name: format_size(float(f"{nbytes:.3g}")) for name, nbytes in sizes.items()}
    head = ["nodes × stages", *(mode.name + _rate_of_each(mode) for mode in MODES)]
    return (
        "\n\n".join(
            [
                INTRODUCTION.format(parameters=model.parameters / 1e9, passes=model.step.passes, mfu=MFU),
                "## Pipeline × context on 32 GPUs",
                SPEEDS,
                markdown_table(head, [speed_row(stages) for stages in STAGES]),
                LAYOUTS,
                markdown_table(LAYOUT_HEAD, [layout_row(stages) for stages in STAGES]),
                "## A million tokens on 64 GPUs",
                MILLION,
                markdown_table(MILLION_HEAD, _million_rows(MILLIONS)),
                "## Stages in different nodes",
                ACROSS.format(**facts, times=boundary_bytes / sizes["payload"], share=boundary_bytes / sizes["whole"]),
                markdown_table(ACROSS_HEAD, [across_row(parts, mode) for mode in MILLION_MODES for parts in PARTS]),
                READING,
            ]
        )
        + "\n"
    )


def _million_rows(ways: Sequence[Million]) -> list[list[str]]:
    return [million_row(way, mode) for way in ways for mode in MILLION_MODES]


LAYOUT_HEAD = [
    "nodes × stages",
    "tokens of a chunk",
    "bubbles",
    "memory of the fullest GPU",
    "between stages",
    "sends, compressed",
    "sends, uncompressed",
    "sends in an averaging",
]
MILLION_HEAD = [
    "nodes × stages",
    "what",
    "rate of each",
    "bytes a step",
    "of its first node",
    "step",
    "tokens/s",
    "memory",
]
ACROSS_HEAD = ["nodes × groups", "what", "rate of each", "sends most", "step", "tokens/s", "memory"]

INTRODUCTION = """# Layouts, planned

Made by `python -m node.lab.plan.layouts`; planned, not run. The model is that of configs/paper-3b.toml:
{parameters:.2g} billion parameters, 32 layers, 131,072 tokens of context, {passes} contexts a step, each of them a
pass, and activations are computed again in the backward. Each GPU is an A100 at {mfu:.0%} of its peak. Where a node has
several, they are its pipeline stages (1F1B), joined by NVLink, and share the node's lines. Every node has one chunk of
the context. Centralized: uncompressed, with a NIC of 100 Gbit/s for each node. Compressed: as in the config, with the
last layer whole; "last layer too" compresses that by 90 % and 80 %. All but the centralized one have 300 Mbit/s and
25 ms, for each link or for each NIC."""

SPEEDS = """The paper's Figure 3 trains this model on 32 GPUs with pipeline and context parallelism. Tokens/s, with
their share of an averaging every 200 steps:"""

LAYOUTS = """What the layouts ask for. Bubbles are the share of a step without network limits in which the GPUs of the
fullest node wait for each other; "between stages" is what one stage hands to the next in a step, inside a node, and the
gradients that come back are as much; what a node sends is that of the one which sends most:"""

MILLION = """The same model with 1,048,576 tokens of context: one context a step on single GPUs, four on pipelines.
Bytes are those of keys, values and gradients in a step, by the formula to which the wire is held
(`node.exchange.payload.step_bytes`), to the byte. Times are those of the simulated network, without averaging."""

ACROSS = """Eight nodes of one GPU each. In one group, all layers are in every node, and keys and values cross. In more
groups, each has a part of the layers, for longer chunks on fewer nodes, and activations cross from group to group in
bfloat16: {boundary} for a pass of 16,384 tokens, as much again in the backward. To one reader, a compressed layer sends
{payload} for as many tokens, so that a boundary is {times:.0f} compressed layers, or {share:.2g} of one that is sent
whole ({whole}). Without averaging:"""

READING = """## Conclusions

- **Compressed against uncompressed**: 9 to 14 times as many tokens/s where each link has a rate of its own, 10 to 15
  times where a node's links share its NIC. With the last layer compressed too, eight nodes of four stages have 72 % of
  the centralized run over separate links, and 13 % over a NIC.
- **Stages in a node cost links.** 32 nodes have 992 links, four have 12, so the more GPUs a node has, the less can
  cross at a time. At a NIC it is nearly the same for all layouts, since fewer nodes send less in all.
- **Stages in different nodes** cross once each way in a pass, however many nodes read a chunk. They pay where lines are
  shared: with a NIC, four groups of two nodes have 2,135 tokens/s against 1,256 in one group, and uncompressed 485
  against 82. Over separate links they do not pay, except where no keys and values cross at all (one node a group),
  which does not fit here.
- Stages save memory: eight single GPUs hold the model and a chunk of eight contexts only in groups of two or four.
- These are predictions: kernels, segments and waits for memory are left out, and no such layout has been run."""


def main() -> None:
    """Write the page."""
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
