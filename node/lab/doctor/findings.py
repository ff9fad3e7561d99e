"""What is wrong with surveyed machines and the ways between them, and the mend. Pure functions of the survey."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from statistics import median, median_low
from typing import NamedTuple

from coordinator.config import is_loopback
from coordinator.survey.host import Guest, Survey
from netem.units import format_rate, format_time
from node.lab.doctor.network import figures_of, loss_of

SLOW = 3.0
"""A way that is so many times slower than the one in the middle is named."""
FAR_S = 0.02
LOSSY = 0.01
CLOCK_S = 2.0
_VPN = "put all machines into one VPN (Tailscale, WireGuard) and name its interface with --bind"


class Finding(NamedTuple):
    """Something that is wrong."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}\n    mend: {self.mend}"


def findings_of(survey: Survey) -> list[Finding]:
    """All that is wrong, what hinders most first."""
    return [
        *_missing(survey),
        *_unreachable(survey),
        *_differing(survey),
        *_machines(survey),
        *_slow(survey),
        *_far(survey),
        *_lossy(survey),
        *_clocks(survey),
    ]


def _missing(survey: Survey) -> Iterator[Finding]:
    if survey.absent:
        yield Finding(
            f"{survey.absent} of {survey.absent + len(survey.guests)} machines did not come",
            "what `isthmus doctor` says on them names the reason; start it on all again",
        )
    for text in survey.lost:
        yield Finding(text, "look at what it says there, and start the survey again")


def _unreachable(survey: Survey) -> Iterator[Finding]:
    guests = {guest.name: guest for guest in survey.guests}
    broken = [ends for ends, way in survey.ways.items() if not way.link.echoed]
    for source, target in broken:
        way, back = survey.ways[source, target], survey.ways.get((target, source))
        if way.heard and back is not None and not back.heard:
            continue  # its probes arrived, and no answer could come back: the way back is named
        yield Finding(f"{source} cannot reach {target}: {way.link.trouble}", _mend_reach(guests[target]))


def _mend_reach(target: Guest) -> str:
    own = target.arrive.facts.own_address
    if is_loopback(own):
        return (
            f"{target.name} listens on its own machine only ({own}); give it --bind with the interface that leads out"
        )
    port = target.arrive.address.rpartition(":")[2]
    if behind_nat(target):
        return (
            f"{target.name} is behind NAT (it is {own}, and seen as {target.seen_from}): {_VPN}, or give it a port "
            f"with --bind tcp://{own}:7071, forward that port in its router, and say so with --advertise "
            f"{target.seen_from}:7071"
        )
    fixed = f"--bind tcp://{own}:7071 gives it one that stays"
    return f"let TCP port {port} of {target.name} pass its firewall ({fixed}), or {_VPN}"


def behind_nat(guest: Guest) -> bool:
    """Whether the host saw another address than the machine has. Both must be known."""
    try:
        own, seen = ipaddress.ip_address(guest.arrive.facts.own_address), ipaddress.ip_address(guest.seen_from)
    except ValueError:
        return False
    return own != seen and not seen.is_loopback and not own.is_loopback


def _differing(survey: Survey) -> Iterator[Finding]:
    facts = {guest.name: guest.arrive.facts for guest in survey.guests}
    for what, found, mend in (
        ("isthmus", {name: one.release for name, one in facts.items()}, "install the same version on all machines"),
        (
            "torch",
            {name: one.torch.partition("+")[0] for name, one in facts.items()},
            "install the same version; other ones round otherwise",
        ),
    ):
        if len(set(found.values())) > 1:
            versions = ", ".join(f"{name} has {version or 'none'}" for name, version in found.items())
            yield Finding(f"versions of {what} differ: {versions}", mend)
    digests = {guest.name: guest.arrive.config_digest for guest in survey.guests if guest.arrive.config_digest}
    if len(set(digests.values())) > 1:
        configs = ", ".join(f"{name} has {digest[:8]}" for name, digest in digests.items())
        yield Finding(
            f"the configs differ: {configs}",
            "start all from the same file with the same settings; compare with --print-config",
        )


def _machines(survey: Survey) -> Iterator[Finding]:
    for guest in survey.guests:
        facts = guest.arrive.facts
        if facts.device.startswith("cuda") and not facts.cuda:
            mend = (
                "install the CUDA build of torch" if facts.gpu else 'set run.device = "cpu" there, or install a driver'
            )
            seen = f"the driver has {facts.gpu}, and torch" if facts.gpu else "torch"
            yield Finding(f"{guest.name} is to compute on {facts.device}, and {seen} finds no GPU", mend)
        elif facts.device == "cpu" and facts.gpu and facts.cuda:
            yield Finding(f"{guest.name} has a GPU ({facts.gpu}) and computes on the CPU", "give it --run.device cuda")
        if "wireless" in facts.interface:
            yield Finding(f"{guest.name} is on a wireless network ({facts.interface})", "use a cable if there is one")
        if facts.short_token:
            yield Finding(
                f"the token on {guest.name} is short, and could be guessed",
                "draw one with openssl rand -hex 16, the same for all",
            )


def _slow(survey: Survey) -> Iterator[Finding]:
    rates = {ends: one.rate_bps for ends, way in survey.ways.items() if (one := figures_of(way)) is not None}
    if len(rates) < 3:
        return
    middle_bps = median(rates.values())
    for (source, target), rate_bps in rates.items():
        if rate_bps * SLOW > middle_bps:
            continue
        others_bps = [other for (one, two), other in rates.items() if one == source and two != target]
        whole = bool(others_bps) and all(other * SLOW <= middle_bps for other in others_bps)
        where = f"the line of {source}, which is slow to all" if whole else "the way between these two"
        yield Finding(
            f"{source} → {target} carries {_rate(rate_bps)}, and the middle of all ways {_rate(middle_bps)}",
            f"look at {where}: cable, switch, Wi-Fi, a VPN's relay, other traffic",
        )


def _far(survey: Survey) -> Iterator[Finding]:
    trips_s = {ends: one.latency_s for ends, way in survey.ways.items() if (one := figures_of(way)) is not None}
    if len(trips_s) < 3:
        return
    middle_s = median(trips_s.values())
    for (source, target), latency_s in trips_s.items():
        if source < target and latency_s > SLOW * middle_s + FAR_S:
            yield Finding(
                f"{source} ↔ {target}: {format_time(float(f'{latency_s:.3g}'))} one way, and "
                f"{format_time(float(f'{middle_s:.3g}'))} in the middle of all ways",
                "if they are not far apart, the way leads through a VPN relay or a full line; connect them directly",
            )


def _lossy(survey: Survey) -> Iterator[Finding]:
    for (source, target), way in survey.ways.items():
        loss = loss_of(way)
        if loss is not None and loss >= LOSSY:
            yield Finding(
                f"{source} → {target} loses packets: TCP sent {way.link.repeated} of {way.link.segments} again at rest",
                "look for Wi-Fi, a bad cable or a full line on the way; TCP slows down with every loss",
            )


def _clocks(survey: Survey) -> Iterator[Finding]:
    names = [guest.name for guest in survey.guests]
    ahead_s = {names[0]: 0.0}
    for (source, target), way in survey.ways.items():
        if source == names[0] and way.link.echoed:
            ahead_s[target] = way.link.ahead_s
    middle_s = median_low(ahead_s.values())
    for name, own_s in ahead_s.items():
        if abs(own_s - middle_s) > CLOCK_S:
            much = format_time(float(f"{abs(own_s - middle_s):.3g}"))
            where = "ahead of" if own_s > middle_s else "behind"
            yield Finding(
                f"the clock of {name} is {much} {where} the others'", "let it be set by NTP: timedatectl set-ntp true"
            )


def _rate(rate_bps: float) -> str:
    return format_rate(float(f"{rate_bps:.3g}"))
