"""A figure over a run's steps in a bounded number of points, however long the run is."""

from __future__ import annotations

from collections.abc import Sequence

MOST_POINTS = 2000


class Series:
    """Columns of numbers over steps. Once `MOST_POINTS` are full, each two points become one: the mean of their
    values, at the later step. A value that is not known is None, and does not count in a mean."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._steps: list[int] = []
        self._columns: dict[str, list[float | None]] = {name: [] for name in self._names}
        self._stride = 1  # records in one point
        self._waiting: list[tuple[int, tuple[float | None, ...]]] = []

    def add(self, step: int, values: Sequence[float | None]) -> None:
        """Take in the values of one step, in the order of the names."""
        self._waiting.append((step, tuple(values)))
        if len(self._waiting) == self._stride:
            self._close_point()
        if len(self._steps) == MOST_POINTS:
            self._halve()

    def truncate(self, step: int) -> None:
        """Drop the points from `step` on: a resumed run does these steps again."""
        self._waiting = [one for one in self._waiting if one[0] < step]
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            for column in self._columns.values():
                column.pop()

    def columns(self) -> dict[str, list[float | None]]:
        """The points so far: "step" and each name, with what has not filled a point as the last one."""
        found: dict[str, list[float | None]] = {"step": [float(step) for step in self._steps]}
        found |= {name: list(column) for name, column in self._columns.items()}
        if self._waiting:
            found["step"].append(float(self._waiting[-1][0]))
            for place, name in enumerate(self._names):
                found[name].append(_mean([values[place] for _, values in self._waiting]))
        return found

    def _close_point(self) -> None:
        self._steps.append(self._waiting[-1][0])
        for place, name in enumerate(self._names):
            self._columns[name].append(_mean([values[place] for _, values in self._waiting]))
        self._waiting = []

    def _halve(self) -> None:
        self._steps = self._steps[1::2]
        for name, column in self._columns.items():
            self._columns[name] = [_mean(column[place : place + 2]) for place in range(0, len(column), 2)]
        self._stride *= 2


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
