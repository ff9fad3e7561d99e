"""A network over time: a profile, its changes with their times, and the lines that follow traces. No clock.

Times are seconds of the wall clock since the run began (`coordinator.live` has that moment). Times in a profile are
dilated, like its latencies. `Endpoint.follow` applies a schedule; `netem.profile` reads one from TOML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec

from netem.changes import Change, Reset, changed
from netem.network import Line, Profile
from netem.trace import Trace
from netem.units import format_time

_MOST_SHOWN = 3
_MOST_LISTED = 16


class Timed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change and its time."""

    at_s: Annotated[float, msgspec.Meta(ge=0, le=1e13)]
    change: Change


class TracedLine(msgspec.Struct, frozen=True):
    """A line whose rate follows a trace. `node` is a name, a pattern or a site, as in `network.Line`."""

    node: str
    directions: tuple[str, ...]
    trace: Trace


class Schedule(msgspec.Struct, frozen=True):
    """The changes in `timed` are in order of time. At equal times the later entry wins; changes win over traces."""

    profile: Profile
    timed: tuple[Timed, ...] = ()
    traced: tuple[TracedLine, ...] = ()

    def profile_at(self, t_s: float) -> Profile:
        """The network at `t_s`, at least 0."""
        lines = tuple(
            Line(one.node, "up" if direction == "up" else "down", one.trace.rate_at(t_s))
            for one in self.traced
            for direction in one.directions
        )
        profile = msgspec.structs.replace(self.profile, lines=self.profile.lines + lines) if lines else self.profile
        due = [timed.change for timed in self.timed if timed.at_s <= t_s]
        return changed(profile, due) if due else profile

    def next_change_s(self, t_s: float) -> float:
        """The time of the next change after `t_s`; infinite if there is none."""
        changes_s = (timed.at_s for timed in self.timed if timed.at_s > t_s)
        return min((next(changes_s, math.inf), *(one.trace.next_change_s(t_s) for one in self.traced)))

    def with_timed(self, more: Iterable[Timed]) -> Schedule:
        """The same schedule with more changes, which win over earlier ones of the same time."""
        timed = sorted((*self.timed, *more), key=lambda one: one.at_s)
        return msgspec.structs.replace(self, timed=tuple(timed))

    def unmatched(self, names: Sequence[str]) -> str | None:
        """A line for the user where a part of the profile matches none of `names`, the nodes of a run; else None.

        A site counts as known even where none of its nodes is in this run: a profile may have more sites than nodes.
        """
        known = {site.name for site in self.profile.sites}
        for part, who in self._mentions():
            if who not in known and not any(self.profile.means(name, who) for name in names):
                return (
                    f"net.profile: [[{part}]] names {who!r}, which matches no node or site in this run; "
                    f"there are {listed([*names, *sorted(known)])}, and patterns of them"
                )
        return None

    def _mentions(self) -> Iterator[tuple[str, str]]:
        """Each part of the profile that names nodes, as its TOML calls it, with the name, pattern or site."""
        for line in self.profile.lines:
            yield "lines", line.node
        for pair in self.profile.pairs:
            yield from (("pairs", pair.source), ("pairs", pair.target))
        for traced in self.traced:
            yield "traces", traced.node
        for timed in self.timed:
            if not isinstance(timed.change, Reset):
                yield from (("schedule", end) for end in timed.change.ends)

    def __str__(self) -> str:
        """The profile and its first changes, in figures of the emulated network."""
        whose = sorted({one.node for one in self.traced})
        parts = [str(self.profile)] + ([f"rates of {', '.join(whose)} by trace"] if whose else [])
        parts += [self.describe(timed) for timed in self.timed[:_MOST_SHOWN]]
        left = len(self.timed) - _MOST_SHOWN
        return "; ".join(parts + ([f"{left} more change{'s' if left > 1 else ''}"] if left > 0 else []))

    def describe(self, timed: Timed) -> str:
        """One change as text, by the emulated clock, such as "at 30 s rate 50 Mbit/s everywhere"."""
        return f"at {format_time(round(timed.at_s / self.profile.dilation, 3))} {timed.change}"


def listed(names: Sequence[str]) -> str:
    """ "node-0, node-1, east": some names for a person, and how many more there are."""
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
