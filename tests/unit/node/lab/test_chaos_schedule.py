"""What `isthmus chaos` draws: fair to the run, the same for the same seed, and every disturbance ends in time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.errors import ConfigError
from node.lab.chaos.schedule import COORDINATOR, KINDS, Kind, Plan, draw

NODES = ("node-0", "node-1", "node-2", "node-3")


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(1.0, 30.0))
def test_some_nodes_are_always_spared_and_victims_recover(seed: int, spared: int, gap_s: float) -> None:
    plan = Plan(seed, duration_s=600.0, mean_gap_s=gap_s, spared=spared)
    found = draw(plan, NODES)
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    for one in found:
        assert one.until_s + plan.recovery_s <= plan.duration_s
        at_once = [other for other in found if other.at_s <= one.at_s < other.until_s + plan.recovery_s]
        assert len({other.victim for other in at_once}) == len(at_once), "a victim is disturbed again too early"
        assert len(set(NODES) - {other.victim for other in at_once}) >= spared
        assert (one.victim == COORDINATOR) == (one.kind is Kind.LEADER)


def test_equal_seeds_give_equal_schedules_and_every_kind_comes() -> None:
    plan = Plan(7, duration_s=5000.0, mean_gap_s=5.0)
    assert draw(plan, NODES) == draw(plan, NODES)
    assert draw(plan, NODES) != draw(Plan(8, duration_s=5000.0, mean_gap_s=5.0), NODES)
    assert {one.kind for one in draw(plan, NODES)} == set(KINDS)


def test_only_the_kinds_that_are_asked_for() -> None:
    plan = Plan(1, duration_s=1000.0, kinds=(Kind.KILL, Kind.CUT))
    assert {one.kind for one in draw(plan, NODES)} == {Kind.KILL, Kind.CUT}


def test_a_run_without_anybody_to_disturb_is_refused() -> None:
    with pytest.raises(ConfigError, match="none is left"):
        draw(Plan(1, duration_s=100.0, spared=2), NODES[:2])
