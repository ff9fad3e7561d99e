"""A run by both machines over a fake wire with a hand-turned clock: steps, rounds, checkpoints."""

from __future__ import annotations

import msgspec
import pytest
from helpers.fake_coordinator import Wire, config, in_round, plan, started, told

from coordinator.events import CheckpointFailed, Faulted, Finish, Forget, PeerLost
from coordinator.messages import (
    Commit,
    Evicted,
    Go,
    Ready,
    Roster,
    Saved,
    Stop,
    Vote,
)
from coordinator.run import Phase
from netem.changes import Cut
from netem.network import UNSHAPED
from netem.schedule import Schedule, Timed


def test_a_run_to_its_end_gives_every_step_once_with_its_cursor() -> None:
    wire = started(nodes=3, steps=13, start_step=10, start_cursor=100, batch=5)
    wire.play()
    for name in wire.members:
        gos = told(wire, name, Go)
        assert [(go.step, go.cursor) for go in gos] == [(10, 100), (11, 105), (12, 110)]
        assert {go.generation for go in gos} == {3}
        assert told(wire, name, Stop) == [Stop(ok=True)]
    assert wire.outcome == (True, "")
    assert [record.step for record in wire.records] == [11, 12, 13]
    assert wire.records[0].nodes["node-1"] == {"tokens": 8.0, "loss_sum": 2.0}
    assert not wire.faults


def test_a_profile_that_names_none_of_the_members_ends_the_run_before_its_first_step() -> None:
    cut = Timed(at_s=5.0, change=Cut(ends=("node-0", "berlin")))
    wire = started(schedule=Schedule(UNSHAPED, timed=(cut,)))
    (stop,) = told(wire, "node-1", Stop)
    assert "[[schedule]] names 'berlin', which matches no node or site in this run" in stop.reason
    assert "there are node-0, node-1, coordinator" in stop.reason
    assert told(wire, "node-1", Roster) == []


def test_nobody_goes_before_all_are_ready() -> None:
    wire = started()
    wire.work("node-0")
    wire.settle()
    assert told(wire, "node-0", Go) == []
    wire.work("node-1")
    wire.settle()
    assert len(told(wire, "node-0", Go)) == len(told(wire, "node-1", Go)) == 1


def test_laggards_are_named_after_the_deadline_that_starts_with_the_first() -> None:
    wire = started(nodes=3)
    wire.advance(500)  # nobody is ready: no deadline but that of progress
    assert wire.run.phase is Phase.BARRIER
    wire.work("node-1")
    wire.settle()
    wire.advance(99)
    assert wire.run.phase is Phase.BARRIER
    wire.advance(2)
    assert wire.run.phase is Phase.BARRIER, "another report may come that says who is to blame"
    wire.advance(11)
    for name in ("node-0", "node-2"):
        (told_off,) = told(wire, name, Evicted)
        assert "had to go: not ready for step 0 within 100 s of node-1" in told_off.reason
    assert [entry.name for entry in told(wire, "node-1", Roster)[-1].members] == ["node-1"]
    assert told(wire, "node-1", Roster)[-1].assignment == [[0, 1, 2, 3]]
    wire.play()
    assert wire.outcome == (True, "")


def test_a_step_that_no_node_finishes_ends_the_run() -> None:
    wire = started()
    wire.play(until=1)
    wire.settle()
    wire.advance(1001)
    assert "no node made progress for 1000 s" in told(wire, "node-0", Stop)[0].reason


def test_digests_that_differ_end_the_run_and_name_who() -> None:
    wire = started(nodes=3)
    for name, basis in (("node-0", "aa"), ("node-1", "bb"), ("node-2", "aa")):
        wire.say(name, Ready(step=0, digests={"basis": basis, f"only-{name}": "x"}))
    wire.settle()
    reason = told(wire, "node-1", Stop)[0].reason
    assert "basis is not the same on all nodes: node-0, node-2 have aa; node-1 has bb" in reason
    assert told(wire, "node-1", Go) == []


def test_a_node_at_another_step_is_named() -> None:
    wire = started()
    wire.say("node-0", Ready(step=40))
    wire.settle()
    wrong = "node-0: ready for step 40 where the run is at step 0"
    assert wrong in told(wire, "node-0", Evicted)[0].reason  # it lives, and its user wants to know
    wire.play()
    assert wire.outcome == (True, "")
    assert wrong in wire.told[0].reason


def test_nonsense_before_the_start_costs_only_its_own_place() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.enter("node-1", run="wrong")
    wire.settle()
    wire.inject("node-0", Ready(step=0))
    wire.settle()
    assert "Ready while the nodes are joining" in told(wire, "node-0", Stop)[0].reason
    assert len(wire.run.membership) == 0
    wire.enter("node-2")
    wire.enter("node-3")
    wire.play()
    assert wire.outcome == (True, "")


def test_strangers_cannot_end_the_run() -> None:
    wire = started()
    wire.event(Faulted("stranger", "nonsense"))
    assert wire.event(PeerLost("stranger", "silent")) == [Forget("stranger")]
    assert wire.run.phase is Phase.BARRIER


# Rounds.


def test_rounds_come_in_order_with_weights_by_owned_chunks() -> None:
    kinds = {0: ["gradients", "moments"], 2: ["weights"]}
    wire = Wire(config(chunks_per_node=(3, 1)), plan(rounds_for=lambda step: kinds.get(step, [])))
    wire.enter("node-0")
    wire.enter("node-1")
    wire.play()
    gos = told(wire, "node-0", Go)
    assert [[(r.round_id, r.kind) for r in go.rounds] for go in gos] == [
        [(0, "gradients"), (1, "moments")],
        [],
        [(2, "weights")],
    ]
    assert gos[0].rounds[0].weights == [0.75, 0.25]
    assert told(wire, "node-0", Commit) == told(wire, "node-1", Commit)
    assert [commit.round_id for commit in told(wire, "node-0", Commit)] == [0, 1, 2]
    assert wire.outcome == (True, "")


def test_a_round_is_named_in_the_step_in_which_it_begins_and_opened_in_that_in_which_it_ends() -> None:
    """The second one begins and ends in the same step. Its other rounds come first."""
    begins, ends = {0: ["a"], 2: ["b"]}, {2: ["a", "b"]}
    wire = Wire(
        config(chunks_per_node=(3, 1)),
        plan(
            rounds_for=lambda step: ["finite"],
            begins_for=lambda step: begins.get(step, []),
            ends_for=lambda step: ends.get(step, []),
        ),
    )
    wire.enter("node-0")
    wire.enter("node-1")
    wire.play()
    gos = told(wire, "node-0", Go)
    assert [[(r.round_id, r.kind) for r in go.begins] for go in gos] == [[(0, "a")], [], [(3, "b")]]
    assert [[(r.round_id, r.kind) for r in go.rounds] for go in gos] == [
        [(1, "finite")],
        [(2, "finite")],
        [(4, "finite"), (0, "a"), (3, "b")],
    ]
    assert gos[0].begins[0].weights == gos[2].rounds[1].weights == [0.75, 0.25]
    assert [commit.round_id for commit in told(wire, "node-1", Commit)] == [1, 2, 4, 0, 3]
    assert wire.outcome == (True, "")


def test_a_round_that_began_before_the_run_was_resumed_does_not_end() -> None:
    kinds = {11: ["a"]}
    wire = started(steps=13, start_step=10, ends_for=lambda step: kinds.get(step, []))
    wire.play()
    assert [go.rounds for go in told(wire, "node-0", Go)] == [[], [], []]
    assert wire.outcome == (True, "")


def test_a_round_that_is_on_its_way_when_a_node_is_lost_happens_nowhere() -> None:
    wire = started(steps=4, begins_for=lambda step: ["a"][step:], ends_for=lambda step: ["a"] if step == 2 else [])
    wire.play(until=1)
    assert told(wire, "node-0", Go)[0].begins
    wire.kill("node-1")
    wire.advance(200)
    wire.play()
    assert told(wire, "node-0", Commit) == []
    assert [(go.step, go.rounds) for go in told(wire, "node-0", Go)][-2:] == [(2, []), (3, [])]
    assert wire.outcome == (True, "")


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        ([(True, "a"), (True, "b"), (True, "a")], "the results differ: node-0, node-2 have a; node-1 has b"),
        ([(True, "a"), (False, ""), (True, "a")], "node-1 could not take part: lost a shard"),
    ],
)
def test_a_round_with_one_against_or_different_happens_nowhere(votes: list[tuple[bool, str]], reason: str) -> None:
    wire = in_round()
    for name, (ok, digest) in zip(wire.members, votes, strict=True):
        wire.say(name, Vote(round_id=0, ok=ok, digest=digest, reason="" if ok else "lost a shard"))
    wire.settle()
    for name in wire.members:
        assert told(wire, name, Commit) == []
        assert [roster.start_step for roster in told(wire, name, Roster)] == [0, 0], "all do the step again"
    wire.play()
    assert wire.outcome == (True, "")
    (fault,) = wire.told
    assert (fault.kind, fault.nodes) == ("disagreed", ())
    assert reason in fault.reason
    assert told(wire, "node-0", Go)[1].rounds[0].round_id == 1, "a round's number is never used again"


def test_a_round_has_a_deadline_that_names_who_did_not_vote() -> None:
    wire = in_round()
    wire.work("node-2")
    wire.settle()
    wire.advance(112)
    reason = "node-0 (pid 7 on atlas), node-1 (pid 7 on atlas) had to go: step 0, averaging of weights: no vote within"
    assert told(wire, "node-0", Evicted)[0].reason.startswith(reason)
    assert told(wire, "node-2", Commit) == []
    assert wire.members["node-0"].committed is None


@pytest.mark.parametrize(
    ("vote", "says"),
    [(Vote(round_id=0, ok=True), "two votes on round 0"), (Vote(round_id=1, ok=True), "open is 0")],
)
def test_a_second_vote_or_one_on_another_round_is_nonsense(vote: Vote, says: str) -> None:
    wire = in_round()
    wire.work("node-0")
    wire.settle()
    wire.inject("node-0", msgspec.structs.replace(vote, generation=3))
    assert says in str(wire.faults[0])
    assert "node-0" not in wire.run.membership
    assert wire.run.phase is Phase.BARRIER


# Checkpoints.


def test_a_checkpoint_is_complete_once_all_have_saved_it() -> None:
    wire = started()
    wire.play(until=1)
    wire.say("node-0", Saved(step=1))
    wire.settle()
    assert wire.checkpoints == []
    wire.say("node-1", Saved(step=1))
    wire.settle()
    assert wire.checkpoints == [1]


def test_a_node_whose_disk_is_full_costs_the_checkpoint_and_not_the_run() -> None:
    wire = started()
    wire.play(until=1)
    wire.say("node-0", Saved(step=1))
    wire.settle()
    assert wire.inject("node-1", Saved(step=1, reason="No space left on device", generation=2)) == [
        CheckpointFailed(1, "node-1: No space left on device")
    ]
    wire.play()
    assert wire.checkpoints == []
    assert wire.outcome == Finish(True, "")


def test_nodes_are_told_which_checkpoints_they_may_remove() -> None:
    wire = started(keep_last=1, kept=[0])
    for step in (1, 2):
        wire.play(until=step)
        for name in ("node-0", "node-1"):
            wire.say(name, Saved(step=step))
        wire.settle()
    wire.play()
    assert [go.keep_from for go in told(wire, "node-0", Go)] == [0, 0, 1]


@pytest.mark.parametrize("message", [Saved(step=9), Saved(step=1)])
def test_a_part_of_no_such_step_or_a_second_one_is_nonsense(message: Saved) -> None:
    wire = started()
    wire.play(until=1)
    wire.say("node-0", Saved(step=1))
    wire.settle()
    wire.inject("node-0", msgspec.structs.replace(message, generation=2))
    assert wire.faults
    assert "node-0" not in wire.run.membership
    wire.play()
    assert wire.outcome == (True, "")
