"""Plans side by side: over bandwidth and nodes, and over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from netem.errors import ConfigError
from netem.profile import resolve
from node.config import Config
from node.lab.plan.costs import Costs
from node.lab.plan.lines import lines_of
from node.lab.plan.model import Model
from node.lab.plan.predict import unlimited

RATES_BPS = tuple(float(rate) for rate in np.geomspace(1e7, 1e11, 17))
NODES = (2, 4, 8, 16, 32, 64)


class Curve(NamedTuple):
    """Throughput over bandwidth for one number of nodes."""

    nodes: int
    tokens_per_s: tuple[float, ...]
    utilisation: tuple[float, ...]


def over_bandwidth(
    config: Config, costs: Costs, nodes: Sequence[int] = NODES, rates_bps: Sequence[float] = RATES_BPS
) -> list[Curve]:
    """Tokens/s and utilisation with every line at each of these rates, in the config's scope and at its latencies.

    The context and the chunks of each node stay as they are; numbers of nodes into which the context does not divide
    are left out. Nodes to which the config gives another line, speed or number of chunks are treated like all others.
    """
    profile = resolve(config.net)
    even = msgspec.structs.replace(
        profile, rate_bps=1.0, lines=(), pairs=tuple(p for p in profile.pairs if p.latency_s)
    )
    even = msgspec.structs.replace(
        even, pairs=tuple(msgspec.structs.replace(pair, has_rate=False, rate_bps=None) for pair in even.pairs)
    )
    curves, alike = [], costs.alike()
    for count in nodes:
        if (changed := with_nodes(config, count)) is None:
            continue
        model, lines = Model(changed), lines_of(even, count)
        free_s = model.simulate(alike, unlimited(lines)).step_s
        steps_s = [model.step_s(alike, lines.scaled(rate_bps)) for rate_bps in rates_bps]
        curves.append(
            Curve(
                count, tuple(model.tokens / step_s for step_s in steps_s), tuple(free_s / step_s for step_s in steps_s)
            )
        )
    return curves


def with_nodes(config: Config, nodes: int) -> Config | None:
    """The config on `nodes` nodes with as many chunks each; None where the context does not divide into the chunks."""
    per_node = max(1, config.model.chunks // config.coordinator.nodes)
    chunks = nodes * per_node
    if config.model.context % chunks:
        return None
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, chunks=chunks),
        coordinator=msgspec.structs.replace(config.coordinator, nodes=nodes, chunks_per_node=(), node_speeds=()),
    )


def with_context(config: Config, context: int) -> Config:
    """The config with another context. Raises `ConfigError` where it does not divide into the chunks."""
    model = msgspec.structs.replace(config.model, context=context)
    if context < 1:
        raise ConfigError(f"--contexts {context}: expected whole numbers of tokens, such as 131072")
    model.check("model.")
    return msgspec.structs.replace(config, model=model)
