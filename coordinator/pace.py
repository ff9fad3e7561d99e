"""Which members compute slower than the others, and how much slower. A machine without I/O.

Each member reports with every step how long it computed (`compute_s`), and how many of the model's floating-point
operations it did in a second of that (`flops_per_s`), which counts the work that its chunks are. A member's slowness in
a step is the median speed of the other members over its own, and it becomes slow where it also computes so many times
longer than their median: a member with few chunks is not slow for the fixed costs of a step, and one with many or late
chunks not for its work. Over the last steps the median counts, so that single steps in which something else took the
machine make no difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median, median_low
from typing import NamedTuple

SPEED, COMPUTE = "flops_per_s", "compute_s"
"""The metrics that hold a member's speed, and how long it computed."""
_MOST_SPEED = 1e24
"""In FLOP/s. A member that tells a larger speed, or one below 1, is not judged."""
_LEAST_S = 1e-9
RECOVERED_SHARE = 0.5
"""A slow member counts as slow until its slowness has lost half of what it was told for, so that one that is near the
limit is not told again and again."""


class Pace(NamedTuple):
    """A member that has become slow, or is slow no more: how many times slower than the median of the others it was
    over the last `steps` steps."""

    name: str
    slowness: float
    steps: int
    lasted_s: float
    """How long these steps took."""
    is_slow: bool

    def __str__(self) -> str:
        if self.is_slow:
            return f"{self.name} computed {self.slowness:.1f} times slower than the median of the others {self._over}"
        return f"{self.name} is slow no more: {1 / self.slowness:.2f} of the median speed of the others {self._over}"

    @property
    def _over(self) -> str:
        return f"over {self.steps} step{'s' if self.steps > 1 else ''}"


class Paces:
    """The paces of one run's members, by plain name. A member is slow from `limit` on, over `steps` steps."""

    def __init__(self, limit: float, steps: int) -> None:
        self._limit = limit
        self._steps = steps
        self._speeds: dict[str, deque[float]] = {}
        self._slowness: dict[str, deque[float]] = {}
        self._lags: dict[str, deque[float]] = {}
        self._slow: dict[str, float] = {}
        self._times_s: deque[float] = deque(maxlen=steps)

    @property
    def slow(self) -> dict[str, float]:
        """The slow members, and how many times slower each was when it was told."""
        return dict(self._slow)

    def speeds(self) -> dict[str, float]:
        """The median speed of each member over its last steps."""
        return {name: median(speeds) for name, speeds in self._speeds.items()}

    def note(self, nodes: Mapping[str, Mapping[str, float]], now_s: float) -> list[Pace]:
        """Take in what the members measured in one step, by plain name: who has become slow, or is slow no more.

        Members that are not there any more are forgotten.
        """
        speeds = {name: values[SPEED] for name, values in nodes.items() if 1.0 <= values.get(SPEED, 0.0) <= _MOST_SPEED}
        lasted_s = {name: nodes[name].get(COMPUTE, 0.0) for name in speeds}
        for known in [name for name in self._speeds if name not in speeds]:
            for kept in (self._speeds, self._slowness, self._lags, self._slow):
                kept.pop(known, None)
        self._times_s.append(now_s)
        if len(speeds) < 2:
            return []
        for name, speed in speeds.items():
            self._keep(self._speeds, name, speed)
            self._keep(self._slowness, name, _of_others(speeds, name) / speed)
            self._keep(self._lags, name, lasted_s[name] / max(_of_others(lasted_s, name), _LEAST_S))
        return [pace for name in sorted(speeds) if (pace := self._judge(name)) is not None]

    def _keep(self, kept: dict[str, deque[float]], name: str, value: float) -> None:
        kept.setdefault(name, deque(maxlen=self._steps)).append(value)

    def _judge(self, name: str) -> Pace | None:
        if len(self._slowness[name]) < self._steps:
            return None
        slowness, told = median_low(self._slowness[name]), self._slow.get(name)
        lasted_s = self._times_s[-1] - self._times_s[0]
        if told is None and min(slowness, median_low(self._lags[name])) >= self._limit:
            self._slow[name] = slowness
            return Pace(name, slowness, self._steps, lasted_s, True)
        if told is not None and slowness < 1 + RECOVERED_SHARE * (self._limit - 1):
            del self._slow[name]
            return Pace(name, slowness, self._steps, lasted_s, False)
        return None


def _of_others(values: Mapping[str, float], name: str) -> float:
    """The median over all but one."""
    return median(value for other, value in values.items() if other != name)
