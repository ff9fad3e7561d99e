"""The paper's throughputs, predicted by the planner: `python -m node.lab.plan.paper` writes docs/netem/paper.md.

Its setting is configs/paper-800m.toml on eight A100s. The paper does not say whether a link or a NIC has the 300
Mbit/s, which node owns which chunk, or which share of the peak it reaches. So the first two are varied, and the MFU is
that of the paper's own centralized run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from netem.network import Scope
from netem.profile import resolve
from netem.tables import markdown_table
from node.config import Config, load_config
from node.lab.plan.costs import Costs, stated
from node.lab.plan.lines import lines_of
from node.lab.plan.model import Model
from node.lab.plan.predict import needed_bps, predict, unlimited
from node.lab.plan.text import rate, seconds
from node.measure.devices import device, devices

CONFIG = Path("configs/paper-800m.toml")
DOCUMENT = Path("docs/netem/paper.md")
CENTRALIZED, COMPRESSED, UNCOMPRESSED = 56_000.0, 55_000.0, 2_700.0
"""Tokens/s that the paper reports."""
SYNC_EVERY = 200
INSTANT = Costs(flops_per_s=1e30)
"""Compute in no time, so that only the time of the network is left."""
MOST_MFU = 0.8
"""No training step is known to reach more of a GPU's peak."""


class Setting(NamedTuple):
    """One line of the table."""

    what: str
    settings: tuple[str, ...]
    tokens_per_s: float
    """The paper's figure; for a variant of ours, that of the run that it varies."""


NARROW = ("--net.rate=300 Mbit/s", "--net.latency=25 ms")
SETTINGS = (
    Setting("uncompressed", ("--compress.mode=dense", *NARROW), UNCOMPRESSED),
    Setting("compressed, last layer whole (the paper's)", NARROW, COMPRESSED),
    Setting("compressed, last layer too (90 % and 80 %)", ("--compress.dense_last_layers=0", *NARROW), COMPRESSED),
    Setting("the same, in int8", ("--compress.dense_last_layers=0", "--compress.format=int8", *NARROW), COMPRESSED),
)
WIDE = ("--compress.mode=dense", "--net.rate=100 Gbit/s", "--net.latency=50 us")
# A tenth of what K and V of all eight layers are in bfloat16, as docs/study/frontier.md has it in small.
SPECTRUM = (
    "--compress.dense_last_layers=0",
    "--compress.budget_bytes_per_token=6554",
    "--compress.format=int4",
    "--compress.dense_format=int8",
)
OURS = (
    Setting("centralized", WIDE, CENTRALIZED),
    SETTINGS[0],
    SETTINGS[1],
    SETTINGS[2],
    Setting("a tenth of all layers' bytes, in int4", (*SPECTRUM, *NARROW), COMPRESSED),
)
OUR_MFU = 0.4
"""The default MFU of `isthmus plan`."""
OWNERSHIPS = {
    "one chunk a node": (),
    "two a node, zigzag": ("--model.chunks=16", "--coordinator.assignment=zigzag"),
}
SCOPES: tuple[Scope, ...] = ("link", "nic")
# Averaging is shown apart: no round falls into these steps.
EXCHANGE_ONLY = ("--train.sync_every=1000000000", "--train.checkpoint_every=0", "--train.eval_every=0")


class Line(NamedTuple):
    """The prediction for one setting, scope and ownership, without averaging."""

    model: Model
    step_s: float
    apart_s: float
    """With nothing overlapped: all compute, then all communication."""
    needs_bps: float | None
    """The rate of each line at which the paper's tokens/s are reached."""
    averaging_s: float
    """One round."""


def config_of(settings: tuple[str, ...], owned: tuple[str, ...], scope: Scope) -> Config:
    """The paper's config with these changes."""
    fixed = ("--coordinator.address=tcp://127.0.0.1:0", "--net.profile=unshaped", f"--net.scope={scope}")
    return load_config(CONFIG, [*fixed, *EXCHANGE_ONLY, *settings, *owned])


def mfu_of(config: Config, tokens_per_s: float) -> float:
    """The MFU at which the config makes `tokens_per_s` on its network; above 1 where no device can."""
    model, lines = Model(config), lines_of(resolve(config.net), config.coordinator.nodes)
    peak = device("a100").peak_flops_per_s

    def speed(mfu: float) -> float:
        return model.tokens / model.simulate(Costs(flops_per_s=peak * mfu), lines).step_s

    low, high = 1e-3, 1e3
    while high / low > 1.001:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if speed(middle) < tokens_per_s else (low, middle)
    return high


def predicted(setting: Setting, owned: tuple[str, ...], scope: Scope, costs: Costs) -> Line:
    """Simulate one setting."""
    config = config_of(setting.settings, owned, scope)
    model, lines = Model(config), lines_of(resolve(config.net), config.coordinator.nodes)
    free_s = model.simulate(costs, unlimited(lines)).step_s
    return Line(
        model,
        model.simulate(costs, lines).step_s,
        free_s + model.simulate(INSTANT, lines).step_s,
        needed_bps(model, costs, lines, model.tokens / setting.tokens_per_s),
        model.averaging_s(lines),
    )


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for ownership, owned in OWNERSHIPS.items():
        mfu = mfu_of(config_of(WIDE, owned, "nic"), CENTRALIZED)
        note = f", more than any training step is known to reach ({MOST_MFU:.0%})" if mfu > MOST_MFU else ""
        parts += [
            f"## {ownership[0].upper()}{ownership[1:]}",
            f"The centralized run makes {CENTRALIZED:,.0f} tokens/s at an MFU of {mfu:.0%}{note}. At that MFU:",
            _table(owned, stated(device("a100"), min(mfu, 1.0))),
        ]
    parts += ["## Our own configuration", OURS_INTRODUCTION, _ours()]
    return "\n\n".join([*parts, READING]) + "\n"


def _table(owned: tuple[str, ...], costs: Costs) -> str:
    head = [
        "what, at 300 Mbit/s",
        "rate of each",
        "step",
        "tokens/s",
        "not overlapped",
        "averaging",
        "paper",
        "it needs",
    ]
    rows = []
    for setting in SETTINGS:
        for scope in SCOPES:
            line = predicted(setting, owned, scope, costs)
            rows.append(
                [
                    setting.what,
                    "link" if scope == "link" else "NIC",
                    seconds(line.step_s),
                    f"{line.model.tokens / line.step_s:,.0f}",
                    f"{line.model.tokens / line.apart_s:,.0f}",
                    f"+{seconds(line.averaging_s / SYNC_EVERY)} a step",
                    f"{setting.tokens_per_s:,.0f}",
                    "no bandwidth" if line.needs_bps is None else rate(line.needs_bps),
                ]
            )
    return markdown_table(head, rows)


def _ours() -> str:
    head = ["what", "rate of each", "step", "tokens/s", "utilisation", "paper", "for 90 %", "bottleneck"]
    on, rows = device("a100"), []
    for setting in OURS:
        rate_of_each = "100 Gbit/s" if setting.settings == WIDE else "300 Mbit/s"
        for scope in SCOPES:
            fixed = ("--coordinator.address=tcp://127.0.0.1:0", f"--net.scope={scope}")
            config = load_config(CONFIG, [*fixed, *setting.settings])
            plan = predict(config, stated(on, OUR_MFU), devices(on.name, config.coordinator.nodes))
            needs = next(need.rate_bps for need in plan.bandwidths if need.utilisation == 0.9)
            rows.append(
                [
                    setting.what,
                    f"{rate_of_each} a {'link' if scope == 'link' else 'NIC'}",
                    seconds(plan.step_s),
                    f"{plan.tokens_per_s:,.0f}",
                    f"{plan.utilisation:.0%}",
                    f"{setting.tokens_per_s:,.0f}",
                    rate(needs),
                    plan.bottleneck.partition(" ")[0],
                ]
            )
    return markdown_table(head, rows)


INTRODUCTION = """# The paper's throughputs, planned

Made by `python -m node.lab.plan.paper`; nothing was run. Setting: configs/paper-800m.toml (793 M parameters, 131,072
tokens of context, bfloat16 payloads) on eight A100s, 25 ms from each other. The paper reports 56K tokens/s centralized
at 100 Gbit/s, 55K compressed and 2.7K uncompressed at 300 Mbit/s. It does not say whether a link or a NIC has that
rate, or which node owns which chunk; both are shown here. Columns: "not overlapped" is the same run with all compute
first and all communication after it; "averaging" is the addition by rounds of all parameters every 200 steps, which no
other column includes; "paper" is the paper's figure for that kind of run; "it needs" is the rate of each line at which
the planner reaches that figure."""

OURS_INTRODUCTION = f"""These are predictions for configs/paper-800m.toml as it is: one chunk a node, at the MFU of
{OUR_MFU:.0%} that `isthmus plan` assumes, averaging included. One row has the setting that docs/study/frontier.md found
best in small at a tenth of the bytes (all layers, ranks by spectrum, int4). Utilisation is relative to the same nodes
on a network without limits; "for 90 %" is the rate of each line at which 90 % is reached; the bottleneck is the part
whose doubling or removal helps most."""

READING = """## Conclusions

- **2.7K uncompressed** is possible only if each link has the 300 Mbit/s: a NIC of that rate, shared by all peers, gives
  an eighth of it. But even on separate links, K and V of a chunk (134 MB) take 3.6 s, sixteen times a step: 57 s, where
  2.7K tokens/s leave 48.5 s. It takes 360 Mbit/s, or fewer bytes than K and V of all layers in bfloat16 in both
  directions.
- **55K compressed** leaves 2.4 s a step, and the last layer alone, sent whole as in the paper, occupies each link for
  7.2 s. No overlap can hide that. With the last layer compressed too (at a milder rank), separate links give more than
  half of it, and in int8 three quarters or more; the planner cannot tell what either costs in loss.
- **56K centralized** needs a far better MFU with one chunk a node, where the last node attends to everything and all
  others wait for it, than with two chunks in zigzag order, which balances the nodes. Zigzag sends half as many bytes
  again: each chunk is half as long, but every node reads from every other.
- Overlap gains up to half the speed again where compute and wire take about the same time, and almost nothing where the
  wire takes nearly all of it.
- So the three figures do not follow from one network, one schedule and one MFU. The tables above show what this system
  would do by its own formulas, without losses to kernels, segments or waiting for memory. They are no reproduction.

The MFU counts the necessary work: matrix products, twice that in the backward, and attention under the causal mask, 2.5
times that in the backward."""


def main() -> None:
    """Write the page."""
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
