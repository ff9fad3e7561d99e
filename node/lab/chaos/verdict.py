"""What came of a run under chaos, from the records and samples of `drive`. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from coordinator.records.rates import Record, number
from netem.tables import markdown_table
from node.lab.chaos.drive import Outcome, Sample
from node.lab.chaos.schedule import Disturbance

SETTLE_S = 5.0
"""For so long after a disturbance the run may still be busy with it."""
WARM_SHARE = 0.25
"""The first part of a process' life that does not count for leaks: caches fill."""


class Effect(NamedTuple):
    """What one disturbance did."""

    disturbance: Disturbance
    stood_s: float
    """The longest time without a step, from its beginning until some seconds after its end."""
    generations: int
    """How often the membership changed meanwhile."""


def effects(outcome: Outcome, recovery_s: float) -> list[Effect]:
    """One for each disturbance."""
    found = []
    for one in outcome.done:
        until_s = min(one.until_s + recovery_s, outcome.lasted_s)
        inside = [(at_s, record) for at_s, record in outcome.records if one.at_s <= at_s <= until_s]
        times_s = [one.at_s, *(at_s for at_s, _ in inside), until_s]
        stood_s = max(later - earlier for earlier, later in pairwise(times_s))
        found.append(Effect(one, stood_s, _generation_changes(outcome, one.at_s, until_s)))
    return found


def throughput_kept(outcome: Outcome, duration_s: float) -> float | None:
    """Steps a second outside disturbances over those before the first one; None where there is too little to tell."""
    if not outcome.done:
        return None
    first_s = outcome.done[0].at_s
    quiet = _quiet(outcome.done, duration_s)
    before = _rate(outcome.records, [(0.0, first_s)])
    after = _rate(outcome.records, [span for span in quiet if span[0] > first_s])
    return after / before if before and after is not None else None


HELD = ("rss_bytes", "threads", "files", "sockets")


class Life(NamedTuple):
    """The longest life of one process, between two times at which it was started: what it held in its earlier half and
    in its later one, by `HELD`, as medians, without the first part."""

    process: str
    lasted_s: float
    early: tuple[float, ...]
    late: tuple[float, ...]


def lives(samples: Sequence[Sample]) -> list[Life]:
    """One for each process of which there are samples enough."""
    found = []
    for process in sorted({sample.process for sample in samples}):
        by_pid: dict[int, list[Sample]] = {}
        for sample in samples:
            if sample.process == process:
                by_pid.setdefault(sample.pid, []).append(sample)
        own = max(by_pid.values(), key=lambda life: life[-1].at_s - life[0].at_s)
        rest = own[int(WARM_SHARE * len(own)) :]
        halves = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        if all(halves):
            early, late = (tuple(median(getattr(one, held) for one in half) for held in HELD) for half in halves)
            found.append(Life(process, own[-1].at_s - own[0].at_s, early, late))
    return found


def lines(outcome: Outcome, duration_s: float, recovery_s: float) -> list[str]:
    """The whole, for people and for Markdown."""
    rows = [
        [
            f"{effect.disturbance.at_s:.0f} s",
            str(effect.disturbance.kind),
            effect.disturbance.victim,
            f"{effect.disturbance.lasts_s:.1f} s",
            f"{effect.stood_s:.1f} s",
            str(effect.generations),
        ]
        for effect in effects(outcome, recovery_s)
    ]
    head = ["at", "what", "who", "lasted", "stood still for", "new generations"]
    kept = throughput_kept(outcome, duration_s)
    steps = sorted({int(number(record, "step")) for _, record in outcome.records})
    told = [
        markdown_table(head, rows, align="rllrrr"),
        "",
        *_by_kind(effects(outcome, recovery_s)),
        "",
        f"steps done: {len(steps)}, of which missing in the records: {steps[-1] - steps[0] + 1 - len(steps)}",
        f"throughput outside disturbances, over that before the first: {'–' if kept is None else f'{kept:.2f}'}",
        f"all of it was stopped from outside for: {outcome.stood_s:.0f} s, which count nowhere",
        f"processes started again: {', '.join(f'{name} {n}' for name, n in outcome.restarts.items()) or 'none'}",
    ]
    if held := [_life_row(life) for life in lives(outcome.samples)]:
        told += ["", markdown_table(["process", "longest life", "memory, MB", "threads", "files", "sockets"], held), ""]
    return [*told, f"ended early: {outcome.ended}"] if outcome.ended else told


def _by_kind(found: Sequence[Effect]) -> list[str]:
    """What each kind of disturbance did, in one table."""
    rows = []
    for kind in sorted({effect.disturbance.kind for effect in found}):
        own = [effect for effect in found if effect.disturbance.kind is kind]
        stood_s = [effect.stood_s for effect in own]
        changes = sum(effect.generations for effect in own)
        rows.append([str(kind), str(len(own)), f"{median(stood_s):.1f} s", f"{max(stood_s):.1f} s", str(changes)])
    head = ["what", "times", "stood still, median", "longest", "new generations"]
    return [markdown_table(head, rows, align="lr")] if rows else []


def _life_row(life: Life) -> list[str]:
    """What was held in the earlier half of a life and in the later one."""
    scales = (1e6, 1, 1, 1)
    held = [
        f"{early / scale:.0f} → {late / scale:.0f}"
        for early, late, scale in zip(life.early, life.late, scales, strict=True)
    ]
    return [life.process, f"{life.lasted_s / 60:.1f} min", *held]


def _generation_changes(outcome: Outcome, from_s: float, until_s: float) -> int:
    before = [record for at_s, record in outcome.records if at_s < from_s]
    inside = [record for at_s, record in outcome.records if from_s <= at_s <= until_s]
    if not inside:
        return 0
    start = number(before[-1] if before else inside[0], "generation")
    return int(number(inside[-1], "generation") - start)


def _quiet(done: Sequence[Disturbance], duration_s: float) -> list[tuple[float, float]]:
    """The spans of time without a disturbance."""
    spans, from_s = [], 0.0
    for one in done:
        if one.at_s > from_s:
            spans.append((from_s, one.at_s))
        from_s = max(from_s, one.until_s + SETTLE_S)
    return [*spans, (from_s, duration_s)] if from_s < duration_s else spans


def _rate(records: Sequence[tuple[float, Record]], spans: Sequence[tuple[float, float]]) -> float | None:
    lasted_s = sum(until_s - from_s for from_s, until_s in spans)
    count = sum(any(from_s <= at_s < until_s for from_s, until_s in spans) for at_s, _ in records)
    return count / lasted_s if lasted_s > 0 else None
