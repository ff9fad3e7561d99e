"""Slow nodes are named with figures, and get fewer chunks where the user wants that; the planner may be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers.fake_coordinator import Wire, started, told

from coordinator.assignment import Assignment
from coordinator.member import State
from coordinator.messages import Ready, Roster
from coordinator.pace import COMPUTE, SPEED, Paces
from coordinator.plan import Worker
from netem.errors import ConfigError

SLOW = {"slow_steps": 4, "slow_factor": 2.0}


def measured(wire: Wire, name: str, speed: float) -> dict[str, float]:
    """What a node of this speed measures, whose chunks are a FLOP each."""
    member = wire.members[name]
    assert member.roster is not None
    return {SPEED: speed, COMPUTE: len(member.roster.assignment[member.rank]) / speed, "tokens": 8.0}


def do_step(wire: Wire, speeds: dict[str, float]) -> None:
    """All members do one step, at these speeds, and wait for the next."""
    for name, member in wire.members.items():
        if name in wire.dead or member.state is not State.RUNNING or member.roster is None:
            continue
        step = member.go.step + (not member.go.tail) if member.go else member.roster.start_step
        wire.say(name, Ready(step=step, metrics=measured(wire, name, speeds[name]) if member.go else {}))
    wire.now_s += 1.0
    wire.settle()


def run(wire: Wire, steps: int, speeds: dict[str, float]) -> None:
    until = wire.run.step + steps
    while wire.run.step < until:
        do_step(wire, speeds)


EVEN = {"node-0": 4.0, "node-1": 4.0, "node-2": 4.0}
ONE_SLOW = {"node-0": 4.0, "node-1": 1.0, "node-2": 5.0}


def three(chunks: int = 12, **settings: Any) -> Wire:
    return started(nodes=3, steps=100, chunks=chunks, settings=SLOW | settings)


def rosters(wire: Wire) -> list[list[int]]:
    """How many chunks each rank had in each generation."""
    return [[len(own) for own in roster.assignment] for roster in told(wire, "node-0", Roster)]


def test_a_slow_node_is_named_once_with_figures_and_so_is_its_recovery() -> None:
    wire = three()
    run(wire, 4, EVEN)
    assert wire.told == []
    run(wire, 20, ONE_SLOW)
    (fault,) = wire.told
    assert (fault.kind, fault.nodes, fault.lost_steps, fault.cost_s) == ("slow", ("node-1",), 0, 0.0)
    assert fault.reason == "node-1 computed 4.5 times slower than the median of the others over 4 steps"
    assert fault.unseen_s == 3.0
    assert "keeps its chunks" in fault.done
    run(wire, 10, EVEN)
    assert [fault.kind for fault in wire.told] == ["slow", "recovered"]
    assert wire.told[-1].reason == "node-1 is slow no more: 1.00 of the median speed of the others over 4 steps"
    assert rosters(wire) == [[4, 4, 4]]


def test_single_slow_steps_name_nobody() -> None:
    wire = three()
    for _ in range(10):
        run(wire, 2, EVEN)
        run(wire, 1, ONE_SLOW)
    assert wire.told == []


def test_a_slow_node_gets_fewer_chunks_where_that_is_wanted_and_its_own_again_when_it_recovers() -> None:
    wire = three(slow="unload")
    run(wire, 8, ONE_SLOW)
    assert rosters(wire) == [[4, 4, 4], [6, 1, 5]]
    run(wire, 8, ONE_SLOW)
    assert len(rosters(wire)) == 2, "it is given fewer once"
    assert "generation 4 has 3 nodes (node-0, node-1, node-2) with 6/1/5 chunks" in wire.told[0].done
    assert wire.told[0].cost_s == 1.0
    run(wire, 8, EVEN)
    assert rosters(wire) == [[4, 4, 4], [6, 1, 5], [4, 4, 4]]
    assert [fault.kind for fault in wire.told] == ["slow", "recovered"]
    steps = [record.step for record in wire.records]
    assert steps == list(range(1, len(steps) + 1)), "each step counts once"


def test_no_generation_begins_where_the_slow_node_has_one_chunk_already() -> None:
    wire = three(chunks=3, slow="unload")
    run(wire, 10, ONE_SLOW)
    assert rosters(wire) == [[1, 1, 1]]
    assert [fault.kind for fault in wire.told] == ["slow"]


def test_a_loss_keeps_the_slow_node_at_its_smaller_part() -> None:
    wire = three(slow="unload", heartbeat_timeout_s=10.0)
    run(wire, 8, ONE_SLOW)
    wire.kill("node-2")
    wire.advance(12.0)
    assert rosters(wire)[-1] == [10, 2]


def test_the_planner_is_asked_with_what_is_known_of_each_node() -> None:
    asked: list[Sequence[Worker]] = []

    def share_out(workers: Sequence[Worker]) -> Assignment:
        asked.append(workers)
        return Assignment([[0, 1, 2], [3]] if len(workers) == 2 else [[0], [1], [2, 3]])

    wire = started(nodes=3, steps=100, settings=SLOW, share_out=share_out)
    assert rosters(wire) == [[2, 1, 1]]
    run(wire, 5, ONE_SLOW)
    wire.kill("node-0")
    wire.advance(12.0)
    assert told(wire, "node-1", Roster)[-1].assignment == [[0, 1, 2], [3]]
    assert list(asked[-1]) == [Worker("node-1", 1, 1.0, 0.0), Worker("node-2", 2, 5.0, 0.0)]


def test_the_run_ends_with_the_figure_where_the_planner_finds_no_room() -> None:
    def share_out(workers: Sequence[Worker]) -> Assignment:
        raise ConfigError("the chunks do not fit on 2 nodes: node-1 would need about 90 GB of its GPU, which has 80 GB")

    wire = started(nodes=3, steps=100, settings=SLOW, share_out=share_out)
    run(wire, 2, EVEN)
    wire.kill("node-2")
    wire.advance(12.0)
    wire.play()
    assert wire.outcome is not None
    assert not wire.outcome.ok
    assert "node-2 (pid 7 on atlas) was lost: silent for 10 s; the chunks do not fit on 2 nodes" in wire.outcome.reason
    assert "the last complete step is 2" in wire.outcome.reason


def test_paces_forget_who_has_gone_and_judge_nobody_alone() -> None:
    paces = Paces(2.0, 2)

    def note(now_s: float, **speeds: float) -> list[str]:
        nodes = {name: {SPEED: speed, COMPUTE: 1 / speed} for name, speed in speeds.items()}
        return [str(pace) for pace in paces.note(nodes, now_s)]

    assert note(0.0, a=1.0, b=3.0) == []
    assert len(note(1.0, a=1.0, b=3.0)) == 1
    assert paces.slow == {"a": 3.0}
    assert note(2.0, b=3.0) == []
    assert paces.slow == {}
    assert note(3.0, a=1.0, b=3.0) == [], "it is judged anew"
    assert paces.speeds() == {"a": 1.0, "b": 3.0}
    assert paces.note({"a": {"tokens": 1.0}, "b": {SPEED: 0.0}}, 4.0) == []
    for nonsense in (float("inf"), float("nan"), 1e-300, 1e300, -1.0):
        note(5.0, a=1.0, b=3.0, c=nonsense)
        assert "c" not in paces.speeds()


def test_few_chunks_make_nobody_slow_where_a_step_has_fixed_costs_and_neither_do_many() -> None:
    """Two members of equal speed, with one and with three chunks."""
    paces = Paces(2.0, 3)
    for now_s in range(10):
        one, three = 1.0 + 0.1 * 1, 1.0 + 0.1 * 3  # seconds
        nodes = {"one": {SPEED: 1 / one, COMPUTE: one}, "three": {SPEED: 3 / three, COMPUTE: three}}
        assert paces.note(nodes, float(now_s)) == []
        late = {"early": {SPEED: 4.0, COMPUTE: 1.0}, "late": {SPEED: 4.0, COMPUTE: 3.0}}
        assert paces.note(late, float(now_s)) == []
