"""A network over time: a profile, what changes when, and the lines that follow traces. Data and arithmetic, no clock.

Times are seconds of the wall clock since the run began (`coordinator.live` says when that was): those that a profile
states are dilated as its latencies are. `Endpoint.follow` carries a schedule out; how people write one is
`netem.profile`.
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
    """A change, and when it happens."""

    at_s: Annotated[float, msgspec.Meta(ge=0, le=1e13)]
    change: Change


class TracedLine(msgspec.Struct, frozen=True):
    """The line of a node, a pattern or a site's, as in `network.Line`, whose rate follows a trace."""

    node: str
    directions: tuple[str, ...]
    trace: Trace


class Schedule(msgspec.Struct, frozen=True):
    """`timed` rise. Of changes at one time, later ones go over earlier ones; changes go over traces."""

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
        """When the network is next another than at `t_s`; infinite if never."""
        changes_s = (timed.at_s for timed in self.timed if timed.at_s > t_s)
        return min((next(changes_s, math.inf), *(one.trace.next_change_s(t_s) for one in self.traced)))

    def with_timed(self, more: Iterable[Timed]) -> Schedule:
        """The same with more changes, which go over those of the same time."""
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
        """In figures of the emulated network: the profile, and what is to come."""
        whose = sorted({one.node for one in self.traced})
        parts = [str(self.profile)] + ([f"rates of {', '.join(whose)} by trace"] if whose else [])
        parts += [self.describe(timed) for timed in self.timed[:_MOST_SHOWN]]
        left = len(self.timed) - _MOST_SHOWN
        return "; ".join(parts + ([f"{left} more change{'s' if left > 1 else ''}"] if left > 0 else []))

    def describe(self, timed: Timed) -> str:
        """ "at 30 s rate 50 Mbit/s everywhere", by the emulated clock."""
        return f"at {format_time(round(timed.at_s / self.profile.dilation, 3))} {timed.change}"


def listed(names: Sequence[str]) -> str:
    """ "node-0, node-1, east": some names for a person, and how many more there are."""
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
