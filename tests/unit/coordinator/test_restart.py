"""A coordinator that is killed at any moment, and started again from its state on disk, under random faults.

What is promised is what `helpers.faulty_world` checks: a generation has one roster, and all who come into it have taken
the same tries at the same steps and have applied the same rounds; and the run ends.
"""

from __future__ import annotations

from collections import Counter, deque

import pytest
from helpers.fake_coordinator import join, started, told
from helpers.faulty_world import FaultyWorld, gone

from coordinator.events import Action, Event, Faulted, Finish, Received, Send
from coordinator.messages import Commit, Go, Roster, Welcome
from coordinator.run import Phase, Run
from coordinator.state import SavedState, decode_state, encode_state
from netem.errors import ProtocolError

SCHEDULES, PARTS = 480, 8

UNACKNOWLEDGED_S = 0.5
"""What the coordinator got so shortly before its death may not be acknowledged yet, and is then sent again."""


class Disk:
    """What a coordinator keeps, as bytes. A restarted one reads it back."""

    def __init__(self) -> None:
        self.data = b""

    def keep(self, run: Run) -> None:
        if (state := run.saved()) is not None:
            self.data = encode_state(state)

    def read(self) -> SavedState | None:
        return decode_state(self.data, "run", "cfg", "disk") if self.data else None


class MortalWorld(FaultyWorld):
    """A faulty world in which the coordinator dies too, before or between the actions that follow from an event."""

    def __init__(self, seed: int) -> None:
        self.disk = Disk()
        self.deaths = 0
        self._recent: dict[str, deque[tuple[float, bytes]]] = {}
        super().__init__(seed)
        self.mortality = self.draw.choice([0.01, 0.03, 0.1])
        wire = self.wire
        wire.event = self._event  # type: ignore[method-assign]
        deliver = wire.deliver_up

        def deliver_up(name: str) -> None:
            self._recent.setdefault(name, deque(maxlen=3)).append((wire.now_s, wire.up[name][0]))
            deliver(name)

        wire.deliver_up = deliver_up  # type: ignore[method-assign]

    def _event(self, event: Event) -> list[Action]:
        """As the server: the state is on disk before the first action is carried out."""
        wire, done, pending = self.wire, list[Action](), deque([event])
        while pending and wire.outcome is None:
            try:
                actions = wire.run.handle(pending.popleft(), wire.now_s)
            except ProtocolError as error:
                wire.faults.append(error)
                pending.append(Faulted(error.peer, str(error)))
                continue
            dies = bool(actions) and self._is_faulty and self.draw.random() < self.mortality
            if dies and self.draw.random() < 0.2:
                self._die()  # before anything is on disk
                return done
            self.disk.keep(wire.run)
            for action in actions[: self.draw.randint(0, len(actions)) if dies else None]:
                wire._do(action)
                done.append(action)
            if dies and wire.outcome is None:
                self._die()
                return done
        return done

    def _die(self) -> None:
        """`kill -9`. What it had sent last is lost; what was not acknowledged comes again."""
        self.deaths += 1
        wire = self.wire
        self.happened.append(f"{wire.now_s:.1f} the coordinator dies in phase {wire.run.phase.name}")
        for name, queue in wire.down.items():
            for _ in range(self.draw.randint(0, len(queue))):
                queue.pop()
            again = [body for at_s, body in self._recent.get(name, ()) if wire.now_s - at_s < UNACKNOWLEDGED_S]
            wire.up[name].extendleft(reversed(again[len(again) - self.draw.randint(0, len(again)) :]))
        wire.now_s += self.draw.choice([0.1, 2.0, 5.0])
        wire.run = Run(wire.config, wire.plan, wire.now_s)
        if (state := self.disk.read()) is not None:
            actions = wire.run.restart(state, wire.now_s)
            self.disk.keep(wire.run)
            for action in actions:
                wire._do(action)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_death_of_the_coordinator_halves_a_step_or_hangs(part: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part, SCHEDULES, PARTS):
        world = MortalWorld(seed)
        outcome = gone(world, seed)
        seen["ended well" if outcome.ok else "ended with a reason"] += 1
        seen["deaths"] += world.deaths
        if outcome.ok:
            ended = [node for node in world.living() if node.begun and node.known == max(world.rosters)]
            assert all(len(node.weights.taken) == world.wire.plan.steps for node in ended), seed
    print(dict(seen))
    assert seen["ended well"] > SCHEDULES / PARTS / 8, "most deaths must be survived; the other faults are many"
    assert seen["deaths"] > SCHEDULES / PARTS / 2


def moments(kinds: list[str]) -> int:
    """How many actions the coordinator carries out in an undisturbed run."""
    wire = started(rounds_for=lambda step: kinds)
    count = 0
    act = wire._do

    def do(action: Action) -> None:
        nonlocal count
        count += 1
        act(action)

    wire._do = do  # type: ignore[method-assign]
    wire.play()
    assert wire.outcome == Finish(True, "")
    return count


KINDS = ["gradients", "take", "weights"]


@pytest.mark.parametrize("number", range(1, moments(KINDS) + 1))
def test_killed_at_each_action_the_run_goes_on_and_each_step_counts_once(number: int) -> None:
    """Nobody else is lost. All actions of an undisturbed run are enumerated."""
    wire, disk, count = started(rounds_for=lambda step: KINDS), Disk(), 0
    disk.keep(wire.run)
    dead = False
    act, handle = wire._do, wire.run.handle

    def handled(event: Event, now_s: float) -> list[Action]:
        nonlocal dead
        actions = handle(event, now_s)
        disk.keep(wire.run)
        return actions

    def do(action: Action) -> None:
        nonlocal count, dead
        count += 1
        dead = dead or count == number
        if not dead:
            act(action)

    wire.run.handle = handled  # type: ignore[method-assign]
    wire._do = do  # type: ignore[method-assign]
    wire.play()
    assert dead
    wire._do = act  # type: ignore[method-assign]
    state = disk.read()
    assert state is not None
    for queue in wire.up.values():
        queue.clear()  # it was acknowledged
    wire.run = Run(wire.config, wire.plan, wire.now_s)
    for action in wire.run.restart(state, wire.now_s):
        wire._do(action)
    for _ in range(100):
        wire.advance(0.5)
        wire.play()
    assert wire.outcome is not None
    assert wire.outcome.ok, wire.outcome.reason
    assert not wire.faults
    for name in wire.members:
        steps = [go.step for go in told(wire, name, Go) if not go.tail]
        assert sorted(set(steps)) == [0, 1, 2]
        commits = [commit.round_id for commit in told(wire, name, Commit)]
        assert sorted(commits) == commits
    recorded = [record.step for record in wire.records]
    assert len(set(recorded)) == len(recorded) >= 2


def test_before_the_first_roster_the_nodes_that_have_joined_are_remembered() -> None:
    wire, disk = started(nodes=3), Disk()
    run = Run(wire.config, wire.plan, 0.0)
    assert run.saved() is None
    for name in ("node-0", "node-1"):
        (welcome,) = run.handle(Received(name, join(name)), 0.0)
        assert isinstance(welcome, Send)
        assert isinstance(welcome.message, Welcome)
    disk.keep(run)
    state = disk.read()
    assert state is not None
    again = Run(wire.config, wire.plan, 5.0)
    assert all(isinstance(action, Send) and action.message == welcome.message for action in again.restart(state, 5.0))
    assert again.phase is Phase.JOINING
    assert again.membership.names == ["node-0", "node-1"]
    actions = again.handle(Received("node-2", join("node-2")), 6.0)
    assert sum(isinstance(action, Send) and isinstance(action.message, Roster) for action in actions) == 3
