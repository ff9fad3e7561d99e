"""The barrier before one step: which members are ready, and whether they agree. A small machine without I/O.

The deadline runs from the first member that is ready: it bounds how far the slowest node may lag behind the fastest,
not how long a step takes. `run` uses it; `rounds` shares `differing`.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from coordinator.messages import Ready
from netem.errors import ProtocolError
from netem.names import plain


class BarrierState(enum.Enum):
    """EMPTY until the first member is ready, FULL once all members are ready."""

    EMPTY = "empty"
    FILLING = "filling"
    FULL = "full"


class Disagreement(NamedTuple):
    """Digests that differ, in words, and the members that most others contradict: none where no value has more than
    half of all members."""

    reason: str
    outvoted: list[str]


class Barrier:
    """Waits for all of `peers` to have done `step` steps.

    Where nodes are sites of several processes, `peers` are site by site, and only those of one of the `columns` must
    agree: each column has a part of the weights of its own.
    """

    def __init__(self, peers: Iterable[str], step: int, timeout_s: float, columns: int = 1) -> None:
        self.step = step
        self._peers = list(peers)
        self._columns = columns
        self._timeout_s = timeout_s
        self._first = ""
        self._deadline_s = float("inf")
        self._ready: dict[str, Ready] = {}

    @property
    def state(self) -> BarrierState:
        """Whether none, some or all of the members are ready."""
        if not self._ready:
            return BarrierState.EMPTY
        return BarrierState.FULL if len(self._ready) == len(self._peers) else BarrierState.FILLING

    def ready(self, peer: str, message: Ready, now_s: float) -> None:
        """Note that a member is ready. Raises `ProtocolError` where it was ready already, or is at another step."""
        if peer in self._ready:
            raise ProtocolError(f"ready twice for step {self.step}", peer=peer)
        if message.step != self.step:
            raise ProtocolError(f"ready for step {message.step} where the run is at step {self.step}", peer=peer)
        if not self._ready:
            self._first, self._deadline_s = plain(peer), now_s + self._timeout_s
        self._ready[peer] = message

    def late(self, now_s: float) -> tuple[list[str], str]:
        """Once the deadline has passed, the members that are late, and with what; none before that."""
        if self.state is not BarrierState.FILLING or now_s <= self._deadline_s:
            return [], ""
        late = [peer for peer in self._peers if peer not in self._ready]
        return late, f"not ready for step {self.step} within {self._timeout_s:g} s of {self._first}"

    def extend(self, seconds: float) -> None:
        """Give the members so much longer."""
        self._deadline_s += seconds

    def disagreement(self) -> Disagreement | None:
        """The first key whose digests differ; None where all of them agree."""
        keys = sorted({key for message in self._ready.values() for key in message.digests})
        for key, column in itertools.product(keys, by_column(self._peers, self._columns)):
            ready = {peer: self._ready[peer].digests for peer in column if peer in self._ready}
            told = {peer: digests[key] for peer, digests in ready.items() if key in digests}
            text = differing({plain(peer): value for peer, value in told.items()})
            if text is not None:
                reason = f"step {self.step}: {key} is not the same on all nodes: {text}"
                return Disagreement(reason, outvoted(told, len(column)))
        return None

    def metrics(self) -> dict[str, dict[str, float]]:
        """The members' metrics, by name; members without metrics are left out."""
        return {plain(peer): self._ready[peer].metrics for peer in self._peers if self._ready[peer].metrics}


def by_column(peers: Sequence[str], columns: int) -> list[Sequence[str]]:
    """Members, given site by site, by column."""
    return [peers[column::columns] for column in range(columns)]


def outvoted(told: Mapping[str, str], members: int) -> list[str]:
    """Those who have another value than more than half of all `members` have; nobody where no value has so many."""
    for value in set(told.values()):
        if 2 * sum(other == value for other in told.values()) > members:
            return [name for name, other in told.items() if other != value]
    return []


def differing(told: Mapping[str, str]) -> str | None:
    """The names that have each value, the largest group first, where values differ; None where all are equal.

    For example ``node-0, node-1 have 33cd; node-2 has 91ab``. A larger group need not be right.
    """
    groups: dict[str, list[str]] = {}
    for name, value in told.items():
        groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return None
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return "; ".join(_group(names, value) for value, names in ordered)


def _group(names: Sequence[str], value: str) -> str:
    verb = "has" if len(names) == 1 else "have"
    return f"{', '.join(names)} {verb} {value[:16] or 'none'}"
