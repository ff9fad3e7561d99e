"""What the page shows of one run, made from its config and its records. A machine without I/O.

`feed` takes records in; `overview` is all that a page needs when it opens, and `news` what has changed since. Both are
bounded: the charts by `Series`, the rest by the number of nodes, layers and evaluations that are kept.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from coordinator.events import GOOD_NEWS, REFUSED_CONNECTIONS, REFUSED_REQUESTS
from coordinator.records import rates
from coordinator.records.rates import Link, MissedLink, Record, number
from netem.network import Profile, Shape
from netem.profile import resolve_schedule
from node.config import Config
from node.train.schedule import StepSchedule
from node.watch.page.series import Series
from node.watch.view import subtitle, title

Json = dict[str, Any]

RECENT_STEPS = 500
MOST_EVALUATIONS = 400
MOST_MARKS = 500

PARTS: Final = (
    *("compute_s", "exposed_forward_s", "exposed_backward_s", "averaging_s"),
    *("barrier_s", "checkpoint_s", "evaluation_s"),
)
"""The parts of a node's step, which add up to `step_s` (`node.worker.meter`)."""

_CHART = ("loss", "tokens_per_s", "step_s", "exposed")
_ENERGY = re.compile(r"layer(\d+)_([kv])_energy_kept")


class LinkWindow:
    """The sums of `rates.link_times_s` over the latest records, kept up to date as records come and go."""

    def __init__(self) -> None:
        self.sums_s: dict[Link, tuple[float, float]] = {}
        self._records: deque[dict[Link, tuple[float, float]]] = deque()

    def add(self, record: Record) -> None:
        """Take in a record."""
        self._records.append(rates.link_times_s(record))
        self._count(self._records[-1], 1)

    def drop_oldest(self) -> None:
        """Forget the oldest record."""
        self._count(self._records.popleft(), -1)
        if not self._records:
            self.sums_s.clear()

    def clear(self) -> None:
        """Forget all."""
        self._records.clear()
        self.sums_s.clear()

    def _count(self, times_s: dict[Link, tuple[float, float]], sign: int) -> None:
        for link, (promised_s, missed_s) in times_s.items():
            before = self.sums_s.get(link, (0.0, 0.0))
            self.sums_s[link] = before[0] + sign * promised_s, before[1] + sign * missed_s


class PageState:
    """One run as its page shows it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._schedule = resolve_schedule(config.net)
        self._steps = StepSchedule(config.model, config.compress, config.train)
        self._series = Series(_CHART)
        self._recent: deque[Json] = deque(maxlen=RECENT_STEPS)
        self._window: deque[Record] = deque()
        self._links_s = LinkWindow()
        self._shapes: dict[Link, Shape] = {}
        self._heldout: deque[tuple[int, float]] = deque(maxlen=MOST_EVALUATIONS)
        self._energy: deque[tuple[int, dict[str, float]]] = deque(maxlen=MOST_EVALUATIONS)
        self._marks: deque[Json] = deque(maxlen=MOST_MARKS)
        self._skipped = 0
        self._faults = 0
        self._refused = {REFUSED_CONNECTIONS: 0, REFUSED_REQUESTS: 0}
        self.step = 0

    def feed(self, record: Record) -> None:
        """Take in one record. Where a resumed run does steps again, the later records count."""
        step = int(number(record, "step"))
        if step <= self.step:
            self._forget_from(step)
        self.step = step
        self._window.append(record)
        self._links_s.add(record)
        for _ in range(rates.drop_old(self._window)):
            self._links_s.drop_oldest()
        point = {
            "step": step,
            "loss": _known(record, "loss"),
            "tokens_per_s": rates.tokens_per_s(list(self._window)[-2:]),
            "step_s": _known(record, "step_s"),
            "exposed": rates.time_share([record], "exposed_s"),
        }
        self._recent.append(point)
        self._series.add(step, [point[name] for name in _CHART])
        if (loss := _known(record, "heldout_loss")) is not None:
            self._heldout.append((step, loss))
        if energy := _energy_kept(record):
            self._energy.append((step, energy))
        self._marks += [{"step": change.step, "text": change.text} for change in rates.network_changes([record])]
        self._marks += [{"step": fault.step, "text": fault.text} for fault in rates.faults([record])]
        self._faults += sum(fault.kind not in GOOD_NEWS for fault in rates.faults([record]))
        for key in self._refused:
            self._refused[key] += int(number(record, key))
        self._skipped += rates.skipped_steps([record])

    def overview(self) -> Json:
        """All that a page needs when it opens, as JSON's values."""
        return {
            "run": {
                "name": self._config.run.name,
                "title": title(self._config),
                "subtitle": subtitle(self._config),
                "layers": self._config.model.layers,
                "dilation": self._config.net.dilation,
                "sites": [
                    {"name": site.name, "nodes": [name for name in self.names() if self._is_at(name, site.name)]}
                    for site in self._schedule.profile.sites
                ],
                "parts": [part.removesuffix("_s") for part in PARTS],
            },
            "series": self._series.columns(),
            **self._events(-1),
            **self._now(),
        }

    def news(self, after_step: int) -> Json:
        """What has changed for a page that has seen `after_step`: what came since then, and the present figures.

        "reload" tells a page that has missed more than is kept, or has seen steps that are done again.
        """
        points = [point for point in self._recent if point["step"] > after_step]
        missed = self.step < after_step or (bool(points) and points[0]["step"] > after_step + 1)
        return {"points": points, "reload": missed, **self._events(after_step), **self._now()}

    def names(self) -> list[str]:
        """The nodes that report, in the order of their names; before the first record those of the config."""
        if self._window:
            return rates.node_names(list(self._window))
        return [f"node-{rank}" for rank in range(self._config.coordinator.nodes)]

    def _now(self) -> Json:
        window = list(self._window)
        last = window[-1] if window else {}
        names, missed = self.names(), rates.missed_of(self._links_s.sums_s)
        return {
            "header": {
                "step": self.step,
                "steps": self._config.train.steps,
                "eta_s": rates.eta_s(window, self._config.train.steps) if window else None,
                "phase": self._steps.phase(self.step) if window else "waiting for the first step",
                "generation": int(number(last, "generation")) if window else 0,
                "untrusted": rates.untrusted_for(missed),
                "loss": _known(last, "loss"),
                "heldout_loss": self._heldout[-1][1] if self._heldout else None,
                "tokens_per_s": rates.tokens_per_s(window) if window else None,
                "saved": saved.all_layers if (saved := rates.compression(window)) else None,
                "skipped": self._skipped,
                "faults": self._faults,
                **self._refused,
                "time": number(last, "time") if window else None,
            },
            "nodes": [self._node(name, window) for name in names],
            "links": self._links(missed, window),
        }

    def _events(self, after_step: int) -> Json:
        """What is there at some steps only."""
        return {
            "heldout": [one for one in self._heldout if one[0] > after_step],
            "energy": [one for one in self._energy if one[0] > after_step],
            "marks": [mark for mark in self._marks if mark["step"] > after_step],
        }

    def _node(self, name: str, window: list[Record]) -> Json:
        values: Mapping[str, Any] = rates.nodes_of(window[-1]).get(name, {}) if window else {}
        parts = {part.removesuffix("_s"): rates.total(window, part, name) / max(1, len(window)) for part in PARTS}
        return {
            "name": name,
            "there": bool(values),
            "parts_s": parts,
            "sent_bps": rates.sent_bps(window, name) if window else None,
            "rss_bytes": _known(values, "rss_bytes"),
            "cpu_percent": _known(values, "cpu_percent"),
            "up_bps": _finite(self._profile().nic_up_bps(name)),
            "down_bps": _finite(self._profile().nic_down_bps(name)),
        }

    def _links(self, missed: list[MissedLink], window: list[Record]) -> list[Json]:
        """Every directed link that carried something lately: how busy it was, and how late this host made it."""
        step_s = {name: rates.total(window, "step_s", name) for name in self.names()}
        late = {(link.source, link.target): link.share for link in missed}
        found = []
        for (source, target), (promised_s, _) in sorted(self._links_s.sums_s.items()):
            shape, lasted_s = self._shape(source, target), step_s.get(source, 0.0)
            found.append(
                {
                    "source": source,
                    "target": target,
                    "rate_bps": _finite(shape.rate_bps),
                    "latency_s": shape.latency_s,
                    "busy": min(1.0, promised_s / lasted_s) if lasted_s > 0 else 0.0,
                    "late": late.get((source, target), 0.0),
                }
            )
        return found

    def _shape(self, source: str, target: str) -> Shape:
        link = source, target
        if link not in self._shapes:
            self._shapes[link] = self._profile().link(source, target)
        return self._shapes[link]

    def _profile(self) -> Profile:
        return self._schedule.profile

    def _is_at(self, name: str, site: str) -> bool:
        return self._schedule.profile.means(name, site)

    def _forget_from(self, step: int) -> None:
        self._series.truncate(step)
        self._window.clear()
        self._links_s.clear()
        for kept in (self._heldout, self._energy):
            while kept and kept[-1][0] >= step:
                kept.pop()
        for places in (self._recent, self._marks):
            while places and places[-1]["step"] >= step:
                places.pop()


def _energy_kept(record: Record) -> dict[str, float]:
    """The share of energy that the subspace kept, by layer and kind ("3k"), where the record has it."""
    return {
        f"{match[1]}{match[2]}": number(record, key)
        for key in record
        if (match := _ENERGY.fullmatch(key)) and _known(record, key) is not None
    }


def _known(record: Record, key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
