"""The network of a running run: its schedule, and the changes that people make in it. A machine without I/O.

Times of the schedule count from the first roster, which is when the run began. A change by command becomes one more
entry of the schedule, shortly ahead, so that it reaches all nodes before it happens and they change together. A node
that hears of it too late, because it was cut off, changes when it hears. The person who asked is answered once all
nodes have confirmed the change, or after `ANSWER_S`. Several changes may be on their way at once. `run` hands events in
and takes actions out; `operator` is the person's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.events import Action, Follow, NetworkChange, Send
from coordinator.messages import COORDINATOR, Alter, Answer, Ask, Refused, shorten
from netem.changes import Cut, Heal, Tune, heals_something, open_cuts
from netem.errors import ProtocolError
from netem.schedule import Schedule, Timed, listed

ANSWER_S = 5.0
"""How long nodes may take to confirm a change."""
_LEAD_S = 0.02  # added to the longest latency to a node
_MOST_SHOWN = 8
_MOST_CHANGES = 10_000


@dataclass
class _Pending:
    """A change that not all nodes have confirmed."""

    asker: str
    until_s: float
    silent: dict[str, str]  # members by peer, with their names
    confirmed: list[str] = field(default_factory=list)


class LiveNetwork:
    """The changes of one run's network. `now_s` is the time of the coordinator's clock."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._began_s: float | None = None
        self._changes: list[Timed] = []
        self._pending: dict[int, _Pending] = {}
        self._told_s = -math.inf  # changes up to this time have been recorded

    def begin(self, now_s: float) -> list[Action]:
        """The first roster is sent: this is time 0."""
        self._began_s = now_s
        return [Follow(self._schedule, now_s)]

    def ask(self, peer: str, ask: Ask, members: Mapping[str, str], step: int, now_s: float) -> list[Action]:
        """A person who has the token asks. `members` are names by peer, all of them once the run has begun."""
        if ask.change is None:
            return [Send(peer, self._answer(step, self.elapsed_s(now_s)))]
        if self._began_s is None:
            return _refuse(peer, "the run has not begun: its nodes are joining")
        timed = Timed(at_s=self._next_time_s(members, now_s), change=ask.change)
        if (reason := self._objection(timed, members)) is not None:
            return _refuse(peer, reason)
        self._changes.append(timed)
        self._schedule = self._schedule.with_timed([timed])
        number = len(self._changes)
        self._pending[number] = _Pending(peer, now_s + ANSWER_S, dict(members))
        return [
            Follow(self._schedule, self._began_s),
            *(Send(member, Alter(number=number, timed=timed)) for member in members),
        ]

    def confirm(self, peer: str, number: int, step: int, now_s: float) -> list[Action]:
        """A node confirms a change. Raises `ProtocolError` where there is no change of that number."""
        if not 0 < number <= len(self._changes):
            raise ProtocolError(f"confirmed change {number} of the network, which does not exist", peer=peer)
        pending = self._pending.get(number)
        if pending is None or peer not in pending.silent:
            return []
        pending.confirmed.append(pending.silent.pop(peer))
        return [] if pending.silent else self._settle(number, step, now_s)

    def tick(self, step: int, now_s: float, *, ends: bool = False) -> list[Action]:
        """Answer the requests that have waited for `ANSWER_S`; all of them where the run `ends`."""
        late = [number for number, one in self._pending.items() if ends or now_s > one.until_s]
        return [action for number in late for action in self._settle(number, step, now_s)]

    def news(self, now_s: float) -> tuple[NetworkChange, ...]:
        """The changes since the last call, without the steps of traces."""
        if self._began_s is None:
            return ()
        before_s, self._told_s = self._told_s, self.elapsed_s(now_s)
        due = [timed for timed in self._schedule.timed if before_s < timed.at_s <= self._told_s]
        return tuple(NetworkChange(round(timed.at_s, 3), str(timed.change)) for timed in due)

    @property
    def began_s(self) -> float:
        """When the first roster was sent."""
        return self._began_s or 0.0

    def restore(self, began_s: float, changes: Sequence[Timed], now_s: float) -> list[Follow]:
        """The network as it was when the coordinator was killed. Who waited for an answer gets none."""
        self._began_s = began_s
        self._told_s = self.elapsed_s(now_s)
        self._changes = list(changes)
        self._schedule = self._schedule.with_timed(self._changes)
        return [Follow(self._schedule, began_s)]

    def changes(self) -> list[Alter]:
        """The changes by command so far, for a node that joins later."""
        return [Alter(number=number, timed=timed) for number, timed in enumerate(self._changes, start=1)]

    def _objection(self, timed: Timed, members: Mapping[str, str]) -> str | None:
        """What is wrong with a change, for the person who asks."""
        change = timed.change
        names = [*members.values(), COORDINATOR]
        ends = change.ends if isinstance(change, Tune | Cut | Heal) else ()
        for end in ends:
            if not any(self._schedule.profile.means(name, end) for name in names):
                sites = [site.name for site in self._schedule.profile.sites]
                there = f"there are {listed([*names, *sites])}, and patterns of them"
                return f"{end!r} matches no node or site in this run; {there}"
        before = [one.change for one in self._schedule.timed if one.at_s <= timed.at_s]
        if isinstance(change, Heal) and not heals_something(change, before):
            return f"there is no cut between {change.ends[0]} and {change.ends[1]}; `net show` lists what has changed"
        if len(self._changes) >= _MOST_CHANGES:
            return f"the network of this run has been changed {_MOST_CHANGES} times; expected no more"
        return None

    def _next_time_s(self, members: Mapping[str, str], now_s: float) -> float:
        """The time of a change that is asked for now: it can have reached all nodes, and earlier changes come first."""
        elapsed_s = self.elapsed_s(now_s)
        profile = self._schedule.profile_at(elapsed_s)
        ways = [profile.link(COORDINATOR, name) for name in members.values()]
        lead_s = max((way.latency_s + way.jitter_s for way in ways), default=0.0) + _LEAD_S
        return max(elapsed_s + lead_s, self._changes[-1].at_s if self._changes else 0.0)

    def _settle(self, number: int, step: int, now_s: float) -> list[Action]:
        pending = self._pending.pop(number)
        # At least the time of the change itself: the clock's time, rounded down, may be just before it.
        elapsed_s = max(self.elapsed_s(now_s), self._changes[number - 1].at_s)
        answer = self._answer(step, elapsed_s, pending.confirmed, tuple(pending.silent.values()))
        return [Send(pending.asker, answer)]

    def _answer(self, step: int, elapsed_s: float, confirmed: Sequence[str] = (), silent: Sequence[str] = ()) -> Answer:
        schedule = self._schedule
        cuts = open_cuts(timed.change for timed in schedule.timed if timed.at_s <= elapsed_s)
        network = "; ".join(map(str, [schedule.profile_at(elapsed_s), *cuts]))
        past = [schedule.describe(timed) for timed in schedule.timed if timed.at_s <= elapsed_s]
        coming = [schedule.describe(timed) for timed in schedule.timed if timed.at_s > elapsed_s]
        return Answer(
            step=step,
            at_s=elapsed_s / schedule.profile.dilation,
            network=network[:512],
            past=past[-_MOST_SHOWN:],
            coming=coming[:_MOST_SHOWN],
            confirmed=list(confirmed),
            silent=list(silent),
        )

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since the first roster was sent."""
        return 0.0 if self._began_s is None else max(0.0, now_s - self._began_s)


def _refuse(peer: str, reason: str) -> list[Action]:
    return [Send(peer, Refused(reason=shorten(reason)))]
