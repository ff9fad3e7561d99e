"""`isthmus plan`: predict a step without running it, or test the planner on runs that were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from netem.errors import ConfigError
from node.config import Config
from node.lab.measured import read_measured
from node.lab.plan import documents
from node.lab.plan.assignments import Candidate, Choice, settle
from node.lab.plan.compare import NODES as NODES_COMPARED
from node.lab.plan.compare import RATES_BPS, over_bandwidth, with_context
from node.lab.plan.costs import Costs, stated_for
from node.lab.plan.fit import case, fit
from node.lab.plan.picture import draw_curves
from node.lab.plan.predict import Prediction, predict
from node.lab.plan.text import assumptions, choice_lines, contexts_table, curves_table, describe
from node.lab.plan.validate import fitted, table, validate
from node.measure.devices import Device, default_device, devices, mix

TOO_LARGE = 3
"""The exit code of a plan that does not fit its device's memory."""


@dataclass(frozen=True)
class Question:
    """The options of the command line, beside the config."""

    device: str
    """One name, or one for each node with commas between them; empty: as `run.device` suggests."""
    mfu: float
    fit: tuple[Path, ...]
    contexts: tuple[int, ...]
    json: bool
    png: Path | None


def plan_config(config: Config, question: Question) -> int:
    """Predict and print: 0, or `TOO_LARGE`. Raises `ConfigError` for what cannot be planned."""
    on = devices(question.device or default_device(config.run.device), config.coordinator.nodes)
    costs, source = _costs(config, on, question)
    plans = [predict(settle(with_context(config, context), costs, on)[0], costs, on) for context in question.contexts]
    config, choice = settle(config, costs, on)
    plan = predict(config, costs, on)
    assumed = assumptions(config, costs, mix(on), source, plan.dilation) + documents.assumed(config)
    if question.json:
        print(json.dumps(_object(config.run.name, plan, choice, plans, costs, assumed)))
    else:
        print(f"{config.run.name}, planned: nothing was run\n")
        print(describe(plan))
        if choice is not None:
            print("\n" + "\n".join(choice_lines(choice)))
        if plans:
            print("\n" + contexts_table(plans))
        print("\nassumed:")
        print("\n".join(f"  - {line}" for line in assumed))
    if question.png is not None:
        _draw(config, costs, f"{mix(on)}, {source}. Bandwidth of each {_line(plan)}; averaging included.", question)
    return 0 if plan.fits else TOO_LARGE


def check_against(runs: Sequence[Path]) -> None:
    """Fit to half of the runs, predict the others, and print both."""
    print(table(validate([case(read_measured(path)) for path in runs])))


def _costs(config: Config, on: Sequence[Device], question: Question) -> tuple[Costs, str]:
    speeds = config.coordinator.node_speeds
    if not question.fit:
        stated = "coordinator.node_speeds" if speeds else f"MFU {question.mfu:g}, assumed"
        return stated_for(config, on, question.mfu), stated
    costs = fit([case(read_measured(path)) for path in question.fit])
    costs = costs.at_rates(speeds) if speeds else costs
    if not question.json:
        print(f"{fitted(costs)}\n")
    return costs, f"fitted to {', '.join(str(path) for path in question.fit)}"


def _draw(config: Config, costs: Costs, note: str, question: Question) -> None:
    assert question.png is not None
    few = max(2, config.coordinator.nodes) if config.coordinator.stages > 1 else max(NODES_COMPARED)  # they take long
    curves = over_bandwidth(config, costs, [nodes for nodes in NODES_COMPARED if nodes <= few])
    if not curves:
        raise ConfigError(f"model.context = {config.model.context}: divides into none of {NODES_COMPARED} nodes")
    if not question.json:
        print("\n" + curves_table(curves, RATES_BPS))
    title = f"{config.run.name}: predicted, {config.compress.mode}, {config.model.context:,} tokens of context"
    path = draw_curves(curves, RATES_BPS, title, note, question.png)
    if not question.json:
        print(f"\npicture:     {path}")


def _line(plan: Prediction) -> str:
    return "NIC" if plan.scope == "nic" else "link"


def _object(
    name: str,
    plan: Prediction,
    choice: Choice | None,
    plans: Sequence[Prediction],
    costs: Costs,
    assumed: Sequence[str],
) -> dict[str, Any]:
    return {
        "name": name,
        **_plain(plan),
        "candidates": [_candidate(one) for one in choice.candidates] if choice else [],
        "contexts": [_plain(other) for other in plans],
        "costs": msgspec.structs.asdict(costs),
        "assumes": list(assumed),
    }


def _plain(plan: Prediction) -> dict[str, Any]:
    figures = msgspec.structs.asdict(plan)
    figures["memory"] = plan.memory._asdict() | {"device": plan.memory.device}
    figures["remedies"] = [remedy._asdict() for remedy in plan.remedies]
    figures["bandwidths"] = [need._asdict() for need in plan.bandwidths]
    figures["across"] = [way._asdict() for way in plan.across]
    derived = {name: getattr(plan, name) for name in ("tokens_per_s", "exposed_s", "utilisation", "fits")}
    return figures | derived


def _candidate(one: Candidate) -> dict[str, Any]:
    assignment = one.config.assignment()
    return {
        "name": one.name,
        "owned": assignment.to_lists(),
        "step_s": one.step_s,
        "evenness": one.evenness,
        "fits": one.room.fits,
    }
