"""How a run ends before its last step, and how its members take leave."""

from __future__ import annotations

import pytest
from helpers.fake_coordinator import LOSS_ENDS, Wire, config, in_round, plan, started, told

from coordinator.events import Cancelled, PeerLost, Received, Tick
from coordinator.member import End
from coordinator.messages import (
    Failed,
    Heartbeat,
    Leave,
    Saved,
    Stop,
)
from coordinator.run import Phase


@pytest.mark.parametrize("phase", [Phase.BARRIER, Phase.ROUND])
def test_where_a_loss_ends_the_run_the_node_is_named_to_the_others_with_the_last_complete_step(phase: Phase) -> None:
    wire = started(
        nodes=3, steps=9, settings=LOSS_ENDS, rounds_for=lambda step: ["weights"] if phase is Phase.ROUND else []
    )
    wire.play(until=2)
    wire.settle()
    assert wire.run.phase is phase
    wire.kill("node-1")
    wire.advance(10.6)
    reason = "node-1 (pid 7 on atlas) was lost: silent for 10 s; the last complete step is 2"
    for name in ("node-0", "node-2"):
        assert told(wire, name, Stop) == [Stop(ok=False, reason=reason)]
        assert wire.members[name].ending == (End.ABORTED, reason)
    assert wire.run.membership.generation == 4
    wire.play()
    assert wire.outcome == (False, reason)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Failed(reason="out of memory"), "node-0 (pid 7 on atlas) failed: out of memory"),
        (Leave(reason="tired"), "node-0 (pid 7 on atlas) left the run: tired"),
        (Leave(), "node-0 (pid 7 on atlas) left the run; the last"),
        (Failed(reason="the loss is nan", ends_run=True), "node-0 (pid 7 on atlas) failed: the loss is nan; the last"),
    ],
)
def test_who_goes_mid_run_ends_it_where_that_is_wanted(message: Failed | Leave, text: str) -> None:
    wire = started(settings={} if isinstance(message, Failed) and message.ends_run else LOSS_ENDS)
    wire.play(until=1)
    wire.say("node-0", message)
    wire.settle()
    assert text in told(wire, "node-1", Stop)[0].reason


def test_the_transport_may_find_a_loss_first() -> None:
    wire = started(settings=LOSS_ENDS)
    wire.event(PeerLost("stranger", "whatever"))
    assert wire.run.phase is Phase.BARRIER
    wire.event(PeerLost("node-1", "connection reset"))
    wire.settle()
    assert "node-1 (pid 7 on atlas) was lost: connection reset" in told(wire, "node-0", Stop)[0].reason


def test_cancelling_tells_all() -> None:
    wire = started()
    wire.event(Cancelled("Ctrl-C"))
    wire.play()
    assert "Ctrl-C" in told(wire, "node-0", Stop)[0].reason
    assert wire.outcome is not None
    assert not wire.outcome.ok


def test_a_silent_coordinator_is_found_by_the_members_in_every_state() -> None:
    wire = started(nodes=2)
    wire.work("node-0")
    for name in wire.members:
        wire.now_s += 10.5
        wire.members[name].tick(wire.now_s)
        ending = wire.members[name].ending
        assert ending is not None
        assert ending == (End.ABORTED, "the coordinator was lost: silent for 10 s")


def test_no_answer_at_all_is_unreachable_after_the_join_timeout() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.members["node-0"].tick(59.0)
    assert wire.members["node-0"].ending is None
    wire.members["node-0"].tick(61.0)
    ending = wire.members["node-0"].ending
    assert ending is not None
    assert ending.how is End.UNREACHABLE


def test_who_never_says_farewell_does_not_keep_the_coordinator() -> None:
    wire = started(steps=1)
    for _ in range(2):
        for name in wire.members:
            wire.work(name)
        wire.settle()
    assert wire.run.phase is Phase.STOPPING
    wire.say("node-0", Leave())
    wire.settle()
    assert wire.outcome is None
    wire.kill("node-1")
    wire.advance(11)
    assert wire.outcome == (True, "")


def test_a_part_saved_after_the_end_counts_but_does_not_put_off_the_farewell() -> None:
    wire = started(steps=1)
    for _ in range(2):
        for name in wire.members:
            wire.work(name)
        wire.settle()
    for name in wire.members:
        wire.say(name, Saved(step=1))
    wire.settle()
    assert wire.checkpoints == [1]
    wire.now_s += 10.5
    for name in wire.members:
        wire.inject(name, Heartbeat())
    wire.tick()
    assert wire.outcome == (True, "")


def test_arrival_times_out_of_order_do_not_turn_the_clock_back() -> None:
    wire = started()
    for now_s in (9.0, 1.0):
        for name in wire.members:
            wire.run.handle(Received(name, Heartbeat()), now_s)
    wire.run.handle(Tick(), 18.0)
    assert wire.run.phase is Phase.BARRIER


def test_heartbeats_go_both_ways_at_their_interval_and_no_oftener() -> None:
    wire = started()
    wire.advance(20, step_s=0.1)
    assert 19 <= len(told(wire, "node-0", Heartbeat)) <= 21
    assert wire.run.phase is Phase.BARRIER


def test_a_coordinator_that_stood_still_finds_nobody_silent_or_late_for_that() -> None:
    """Its machine slept, say, with those of the nodes: without the excuse all of them would be lost."""
    wire = in_round(nodes=3)
    wire.work("node-0")
    wire.advance(1.0)
    wire.now_s += 5000.0
    for action in wire.run.excuse(5000.0, wire.now_s):
        wire._do(action)
    wire.tick()
    wire.settle()
    wire.advance(90.0)
    assert wire.run.phase is Phase.ROUND
    assert wire.told == []
    assert "stood still for 5000 s" in wire.said[0]
    wire.play()
    assert wire.outcome == (True, "")
