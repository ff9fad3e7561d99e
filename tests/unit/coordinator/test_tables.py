"""The protocol's tables say where each row leads: no move goes elsewhere, every promise is kept, the diagrams agree."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_coordinator import Wire, config, in_round, join, plan, started, told

from coordinator import diagram, member, run
from coordinator.events import Cancelled, Faulted, PeerLost, Received, Tick
from coordinator.member import LOCAL, REMOTE, Member, State
from coordinator.messages import (
    PROTOCOL_VERSION,
    Alter,
    Ask,
    Changed,
    Commit,
    Evicted,
    Failed,
    Go,
    Heartbeat,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    RosterEntry,
    Saved,
    Stop,
    Suspect,
    Vote,
    Welcome,
)
from coordinator.run import TABLE, Phase
from coordinator.table import Row, arrive, row
from netem.changes import Cut, Reset
from netem.errors import ProtocolError
from netem.network import UNSHAPED
from netem.schedule import Schedule, Timed

WALKS, MOVES = 4000, 60
OPERATOR = "(operator)~1"


class Walk:
    """Both machines over the fake wire, led by chance: work and deliveries, faults, and messages out of turn."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.nodes = self.draw.choice([1, 1, 2, 3])
        rounds = self.draw.choice([[], ["weights"], ["weights", "moments"]])
        nobody = (Timed(at_s=5.0, change=Cut(ends=("node-0", "berlin"))),)
        schedule = Schedule(UNSHAPED, timed=nobody if seed % 40 == 0 else ())
        planned = plan(steps=self.draw.choice([1, 2, 4]), rounds_for=lambda _: rounds, schedule=schedule)
        limits = {"min_nodes": self.draw.randint(1, self.nodes), "max_retries_per_step": self.draw.choice([0, 1, 9])}
        self.wire = Wire(config(nodes=self.nodes, **limits), planned)
        self.mischief = self.draw.choice([0.02, 0.1, 0.4])

    def go(self) -> None:
        for name in [f"node-{rank}" for rank in range(self.nodes)]:
            self.wire.enter(name, run=self.draw.choice(["run"] * 9 + ["wrong"]))
        for _ in range(MOVES):
            if self.wire.outcome is not None:
                self.after()
            moves = self.faults if self.draw.random() < self.mischief else self.course
            self.draw.choice(moves)(self, self.draw.choice(list(self.wire.members)))
            self.wire.now_s += self.draw.choice([0.01, 0.01, 0.01, 1.0])

    def work(self, name: str) -> None:
        self.wire.work(name)

    def together(self, name: str) -> None:
        """All work, and hear all that was said."""
        for one in self.wire.members:
            self.wire.work(one)
        for one in self.wire.members:
            while self.wire.up[one]:
                self.up(one)
        for one in self.wire.members:
            while self.wire.down[one]:
                self.down(one)

    def up(self, name: str) -> None:
        if self.wire.up[name]:
            self.wire.deliver_up(name)

    def down(self, name: str) -> None:
        if self.wire.down[name]:
            self.hear(name, lambda: self.wire.deliver_down(name))

    def tick(self, name: str) -> None:
        self.wire.tick()

    def wait(self, name: str) -> None:
        """A long time passes, in which some nodes are heard."""
        self.wire.now_s += self.draw.choice([9.0, 11.0, 61.0, 101.0, 1001.0])
        for peer in self.draw.sample(
            self.wire.run.membership.peers, k=self.draw.randint(0, len(self.wire.run.membership))
        ):
            self.wire.inject(peer, Heartbeat())
        self.tick(name)

    def saved(self, name: str) -> None:
        self.say(name, Saved(step=self.wire.run.step))

    def changed(self, name: str) -> None:
        self.say(name, Changed(number=1))

    def leave(self, name: str) -> None:
        self.say(name, self.draw.choice([Leave(), Failed(reason="x"), Failed(reason="x", ends_run=True)]))

    def new(self, name: str) -> None:
        """A member that has not joined yet."""
        fresh = Member(self.wire.config)
        fresh.tick(self.wire.now_s)
        self.draw.choice(
            [
                lambda: fresh.send(Suspect(peer="node-1", reason="x"), 0.0),
                lambda: fresh.send(Leave(), 0.0),
                lambda: fresh.send(Failed(reason="x"), 0.0),
                lambda: fresh.lose("x"),
            ]
        )()

    def late(self, name: str) -> None:
        self.wire.inject(self.draw.choice(["late", name]), join("late"))

    def again(self, name: str) -> None:
        """One that was told to go asks to join anew."""
        self.say(name, join(name))

    def suspect(self, name: str) -> None:
        self.say(name, Suspect(peer=self.draw.choice(list(self.wire.members)), reason="x"))

    def ask(self, name: str) -> None:
        change = self.draw.choice([None, Reset()])
        self.wire.inject(OPERATOR, Ask(version=PROTOCOL_VERSION, change=change))

    def break_off(self, name: str) -> None:
        self.wire.members[name].lose("the transport broke")

    def event(self, name: str) -> None:
        peer = self.draw.choice([name, "stranger"])
        event = self.draw.choice([PeerLost(peer, "x"), Faulted(peer, "x"), Cancelled("x")])
        self.wire.event(event)

    def speak(self, name: str) -> None:
        """A node sends any message at any time, past its own machine."""
        step, generation = self.wire.run.step, self.wire.run._generations.number
        messages = [
            Ready(step=step, generation=generation, digests={"weights": self.draw.choice("xy")}),
            Ready(step=step + 1, generation=generation),
            Vote(round_id=self.draw.randint(0, 2), ok=self.draw.random() < 0.5, generation=generation),
            Suspect(peer="node-1", reason="x", generation=generation),
        ]
        messages += [
            Saved(step=step, generation=generation),
            Changed(number=1),
            Leave(),
            Failed(reason="x"),
            Heartbeat(),
        ]
        self.wire.inject(name, self.draw.choice(messages))

    def whisper(self, name: str) -> None:
        """A member hears any message at any time, which the coordinator did not send."""
        one = self.wire.members[name]
        here = plain_roster(one, self.draw.choice([0, 1, 2]))
        go = Go(step=one._ready_step if one._ready_step >= 0 else 0, generation=here.generation, cursor=0)
        open_round = one._rounds_left[0] if one._rounds_left else 0
        messages: list[Any] = [here, go, Heartbeat(), Stop(ok=False), Commit(round_id=open_round)]
        messages += [Commit(round_id=self.draw.choice([open_round, 10**6]), again=True)]
        messages += [Pause(generation=here.generation, reason="x"), Evicted(reason="x")]
        messages += [Refused(reason="no", address="tcp://elsewhere:1")]
        messages += [Welcome(rank=-1, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0), Refused(reason="no")]
        messages += [Alter(number=len(one.changes) + 1, timed=Timed(at_s=1.0, change=Reset()))]
        self.hear(name, lambda: one.receive(self.draw.choice(messages), self.wire.now_s))

    def say(self, name: str, message: NodeMessage) -> None:
        with contextlib.suppress(ProtocolError):
            self.wire.say(name, message)

    def hear(self, name: str, take: Callable[[], object]) -> None:
        """As `client.Session` does: what the machine refuses ends the run for this node."""
        try:
            take()
        except ProtocolError as error:
            if self.draw.random() < 0.5:
                self.wire.members[name].lose(str(error))

    def after(self) -> None:
        """The run is over: the machine is still asked."""
        name = self.draw.choice(list(self.wire.members))
        said = [Heartbeat(), join("late"), Ask(version=PROTOCOL_VERSION)]
        event = self.draw.choice([Cancelled("x"), Tick(), *(Received(name, message) for message in said)])
        self.wire.run.handle(event, self.wire.now_s)

    course = (together, work, work, work, up, up, up, down, down, down, tick)
    faults = (wait, saved, changed, leave, new, late, again, suspect, ask, break_off, event, speak, speak, whisper)


def plain_roster(one: Member, ahead: int) -> Roster:
    """A roster of this member alone, `ahead` generations later than its own."""
    assert one._join is not None
    name = one._join.name
    entry = RosterEntry(name=name, peer=name, rank=0, address="x")
    generation = (one.roster.generation if one.roster else 1) + ahead
    return Roster(generation=generation, members=[entry], assignment=[[0, 1, 2, 3]])


def rare_ways() -> None:
    """What chance hardly finds: guests that go, losses while the run is paused, and a guest that is held off."""
    gone = Failed(reason="x")
    for event in (PeerLost("", "x"), Faulted("", "x"), Received("", Leave()), Received("", gone)):
        for phase in (Phase.BARRIER, Phase.ROUND):
            wire = in_round(3) if phase is Phase.ROUND else started(3)
            wire.event(PeerLost("node-2", "x"))
            for name in ("node-0", "node-1") if phase is Phase.ROUND else ():
                wire.settle()
                wire.work(name)
            wire.enter("node-9")
            wire.settle()
            assert wire.run.phase is phase
            wire.event(event._replace(peer="node-9"))
            assert wire.run.phase is phase, "a guest costs nothing"
        for guest in (False, True):
            wire = started(4, settings={"min_nodes": 4})
            for lost in ("node-3", "node-2"):
                wire.event(PeerLost(lost, "x"))
            if guest:
                wire.enter("node-9")
                wire.settle()
            for lost in ("node-1", "node-0"):
                wire.event(event._replace(peer=lost))
            assert wire.run.phase is (Phase.STOPPING if guest else Phase.FINISHED), "nobody has the weights"
        wire = in_round(2, {"min_nodes": 2})
        wire.event(event._replace(peer="node-1"))
        assert wire.run.phase is Phase.PAUSED
    flaps()
    differs()


def flaps() -> None:
    wire = started(2, settings={"min_nodes": 2})
    for _ in range(2):
        wire.event(PeerLost("node-1", "x"))
        wire.enter("node-1")
        wire.settle()
    assert wire.run.phase is Phase.PAUSED, "it was lost twice, and is held off"
    wire.advance(12)
    assert wire.run.phase is Phase.BARRIER


def differs() -> None:
    wire = started(3, settings={"min_nodes": 3})
    wire.play(until=1)
    for name, digest in (("node-0", "a"), ("node-1", "a"), ("node-2", "b")):
        wire.settle()
        wire.say(name, Ready(step=2, digests={"weights": digest}))
    wire.settle()
    assert wire.run.phase is Phase.PAUSED
    assert told(wire, "node-2", Evicted)


def promises(table: Any) -> set[tuple[Any, type, Any]]:
    return {(phase, kind, following) for (phase, kind), one in table.items() for following in one.leads_to}


def test_a_random_walk_keeps_to_the_tables_and_reaches_all_that_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[Any, type, Any]] = set()

    def noted(table: Any, before: Any, kind: type, after: Any) -> None:
        arrive(table, before, kind, after)
        seen.add((before, kind, after))

    for module in (run, member):
        monkeypatch.setattr(module, "arrive", noted)
    for seed in range(WALKS):
        Walk(seed).go()
    rare_ways()
    missing = (promises(TABLE) | promises(LOCAL) | promises(REMOTE)) - seen
    assert not missing, "\n".join(sorted(map(str, missing)))
    assert seen == promises(TABLE) | promises(LOCAL) | promises(REMOTE)


def test_a_move_that_leads_elsewhere_is_our_own_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = started()
    ready = TABLE[Phase.BARRIER, Ready]
    monkeypatch.setitem(TABLE, (Phase.BARRIER, Ready), Row(ready.move, frozenset({Phase.ROUND})))
    with pytest.raises(AssertionError, match=r"Ready in .*BARRIER"):
        wire.inject("node-0", Ready(step=0, generation=2))
    monkeypatch.setitem(REMOTE, (State.RUNNING, Stop), row(REMOTE[State.RUNNING, Stop].move, State.GONE))
    with pytest.raises(AssertionError, match=r"Stop in .*RUNNING"):
        wire.members["node-0"].receive(Stop(ok=True), 0.0)
    monkeypatch.setitem(LOCAL, (State.RUNNING, Leave), row(LOCAL[State.RUNNING, Leave].move, State.DONE))
    with pytest.raises(AssertionError, match=r"Leave in .*RUNNING"):
        wire.members["node-1"].send(Leave(), 0.0)


def test_the_diagrams_in_the_docs_are_current() -> None:
    page = diagram.PAGE.read_text(encoding="utf-8")
    assert diagram.with_diagrams(page) == page, "run python -m coordinator.diagram"
    for table in (TABLE, LOCAL, REMOTE):
        for phase, kind, following in promises(table):
            arrow = f"    {phase.name} --> {following.name}: "
            lines = [line for line in page.splitlines() if line.startswith(arrow)]
            assert (kind.__name__ in " ".join(lines)) == (phase is not following)


def test_a_page_without_its_markers_is_not_written() -> None:
    with pytest.raises(AssertionError, match="no markers for the coordinator diagram"):
        diagram.with_diagrams("# A page\n")
