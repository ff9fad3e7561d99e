"""A survey in words: the machines, the ways between them, what is wrong, the network as TOML, and the plan."""

from __future__ import annotations

import re

import msgspec

from coordinator.survey.host import Guest, Survey, Way
from coordinator.survey.messages import Verdict
from netem.config import convert
from netem.errors import ConfigError
from netem.profile import ProfileConfig
from netem.tables import markdown_table
from netem.units import format_rate, format_size, format_time
from node.config import Config
from node.lab.doctor.findings import Finding, behind_nat, findings_of
from node.lab.doctor.network import as_toml, loss_of, profile_of
from node.measure.devices import DEVICES, Device, default_device


def judge(survey: Survey, config: Config | None) -> Verdict:
    """What a survey means. `config` is that of the run to be planned."""
    tree = profile_of(survey)
    profile = as_toml(tree, survey) if tree else ""
    parts = [_machines(survey)]
    found = findings_of(survey)
    if len(survey.guests) > 1:
        parts.append(_ways(survey))
    if tree and config is not None:
        plan, more = _plan(survey, config, convert(ProfileConfig, tree, "profile"))
        found += more
    else:
        plan = "give the run's config to isthmus doctor, and it plans the run" if tree else ""
    parts.append(_wrong(found, survey))
    parts += [f"This network as a profile:\n\n{profile.rstrip()}"] if profile else []
    parts += [f"The plan on this network:\n\n{plan}"] if plan else []
    return Verdict(text="\n\n".join(parts), profile=profile, wrong=len(found))


def _machines(survey: Survey) -> str:
    head = ["machine", "isthmus", "torch", "computes on", "cores", "memory free", "disk free", "listens", "seen from"]
    return markdown_table(head, [_machine(guest) for guest in survey.guests])


def _machine(guest: Guest) -> list[str]:
    facts = guest.arrive.facts
    device = facts.device
    if facts.gpu:
        device += f": {facts.gpu}, {format_size(float(f'{facts.gpu_bytes:.3g}'))}, driver {facts.driver or 'unknown'}"
    interface = f" ({facts.interface})" if facts.interface else ""
    return [
        guest.name,
        facts.release or "not installed",
        facts.torch,
        device,
        str(facts.cores),
        f"{_size(facts.free_memory_bytes)} of {_size(facts.memory_bytes)}",
        _size(facts.free_disk_bytes),
        guest.arrive.address.removeprefix("tcp://") + interface,
        guest.seen_from + (", behind NAT" if behind_nat(guest) else ""),
    ]


def _ways(survey: Survey) -> str:
    head = ["way", "rate", "all at once", "one way", "jitter", "sent again", "clock"]
    rows = [[f"{source} → {target}", *_way(survey.ways[source, target])] for source, target in sorted(survey.ways)]
    return markdown_table(head, rows, align="lr")


def _way(way: Way) -> list[str]:
    link = way.link
    if not link.echoed:
        return ["none", "", "", "", "", ""]
    loss = loss_of(way)
    return [
        _rate(way.rate_bps),
        _rate(way.shared_bps),
        _time(link.latency_s),
        _time(link.jitter_s),
        "" if loss is None else f"{100 * loss:.2g} %",
        f"{link.ahead_s:+.3f} s",
    ]


def _wrong(found: list[Finding], survey: Survey) -> str:
    if not found:
        how = "reach each other" if len(survey.guests) > 1 else "is ready"
        return f"Nothing is wrong: {len(survey.guests)} machines {how}."
    return "What is wrong:\n" + "\n".join(f"{number}. {one}" for number, one in enumerate(found, 1))


def _plan(survey: Survey, config: Config, profile: ProfileConfig) -> tuple[str, list[Finding]]:
    """The plan of the run on this network, and what is wrong with its machines for that."""
    from node.lab.plan.assignments import settle
    from node.lab.plan.costs import stated_for
    from node.lab.plan.predict import Prediction, predict
    from node.lab.plan.text import describe

    nodes = len(survey.guests)
    try:
        owners = msgspec.structs.replace(
            config.coordinator, nodes=nodes, min_nodes=min(nodes, config.coordinator.min_nodes)
        )
        network = msgspec.structs.replace(config.net, profile=profile, rate=None, latency=None, scope=None)
        config = msgspec.structs.replace(config, coordinator=owners, net=network)
        config.check("")
        on = [_device(guest) for guest in survey.guests]
        costs = stated_for(config, on)
        config, _ = settle(config, costs, on)
        plan: Prediction = predict(config, costs, on)
    except ConfigError as error:
        return f"none: {error}", [Finding(f"this config cannot be trained by {nodes} machines: {error}", "change it")]
    more = [] if plan.fits else [Finding("the model does not fit their memory", "see the plan below")]
    return describe(plan), [*more, *_disks(survey, config, plan.parameters)]


def _disks(survey: Survey, config: Config, parameters: float) -> list[Finding]:
    """Each node keeps weights and two moments of each parameter in every checkpoint, and one more while it writes."""
    needed_bytes = 12 * parameters * (config.train.keep_last + 1)
    return [
        Finding(
            f"{guest.name} has {_size(free_bytes)} of disk free, and its checkpoints need {_size(needed_bytes)}",
            "free some, or set run.outputs to a larger disk there, or train.keep_last lower",
        )
        for guest in survey.guests
        if 0 < (free_bytes := guest.arrive.facts.free_disk_bytes) < needed_bytes
    ]


def _device(guest: Guest) -> Device:
    """What the planner knows of this machine's device, with its real memory."""
    facts = guest.arrive.facts
    if facts.device.startswith("cuda") and facts.gpu:
        known = [one for one in DEVICES.values() if one.named and re.search(one.named, facts.gpu)]
        device = known[0] if known else DEVICES[default_device("cuda")]
        return device._replace(memory_bytes=float(facts.gpu_bytes or device.memory_bytes))
    device = DEVICES[default_device(facts.device)]
    return device._replace(memory_bytes=float(facts.free_memory_bytes or device.memory_bytes))


def _size(nbytes: float) -> str:
    return format_size(float(f"{nbytes:.3g}")) if nbytes else "unknown"


def _rate(rate_bps: float) -> str:
    return format_rate(float(f"{rate_bps:.3g}")) if rate_bps else ""


def _time(seconds: float) -> str:
    return format_time(float(f"{seconds:.2g}"))
