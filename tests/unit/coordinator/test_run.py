"""The protocol, both machines against each other over a fake wire with a hand-turned clock."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers.fake_coordinator import Wire, config, join, plan, started
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.events import Cancelled, Event, Faulted, Forget, PeerLost, Received, Send, Tick
from coordinator.member import End, State
from coordinator.messages import (
    Abort,
    Ask,
    Changed,
    Commit,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    Ready,
    Refused,
    Roster,
    Saved,
    Stop,
    Vote,
    Welcome,
)
from coordinator.run import TABLE, Phase, Run
from netem.changes import Cut, Reset
from netem.errors import ConfigError, ProtocolError
from netem.network import UNSHAPED
from netem.schedule import Schedule, Timed


def told(wire: Wire, name: str, kind: type) -> list[Any]:
    return [message for message in wire.heard[name] if type(message) is kind]


# Rendezvous.


def test_a_complete_world_gets_one_roster_with_ranks_in_name_order_whoever_came_first() -> None:
    wire = Wire(config(nodes=3), plan(chunks=6, start_step=7, steps=9))
    for name in ("node-10", "node-2", "node-1"):
        assert len(wire.run.membership) < 3
        wire.enter(name)
        wire.settle()
    rosters = [told(wire, name, Roster)[0] for name in wire.members]
    assert rosters[0] == rosters[1] == rosters[2]
    assert [(entry.name, entry.rank) for entry in rosters[0].members] == [
        ("node-1", 0),
        ("node-2", 1),
        ("node-10", 2),
    ]
    assert rosters[0].generation == 3
    assert rosters[0].start_step == 7
    assert rosters[0].assignment == [[0, 1], [2, 3], [4, 5]]
    assert wire.members["node-10"].rank == 2


def test_a_wish_for_a_rank_is_honoured_and_the_others_fill_the_gaps() -> None:
    wire = Wire(config(nodes=3), plan())
    wire.enter("a")
    wire.enter("b")
    wire.enter("c", rank=0)
    wire.settle()
    assert {name: member.rank for name, member in wire.members.items()} == {"a": 1, "b": 2, "c": 0}
    assert told(wire, "c", Welcome)[0].rank == 0
    assert told(wire, "a", Welcome)[0].rank == -1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": "wrong"}, "does not have this run's token"),
        ({"token": "wrong", "config_digest": "other"}, "token"),
        ({"version": 99}, "protocol version 99"),
        ({"config_digest": "other"}, "configuration of node-1 differs"),
        ({"address": "same"}, "node-0 already listens at same"),
        ({"rank": 1}, "rank 1 is taken by node-0"),
        ({"rank": 2}, "rank 2 is not in a world of 2"),
        ({"run": "other", "config_digest": "other"}, "this is run 'run', node-1 asks for run 'other'"),
    ],
)
def test_a_wrong_joiner_is_told_why_and_the_place_stays_free(changes: dict[str, Any], reason: str) -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0", rank=1, address="same")
    wire.enter("node-1", **changes)
    wire.settle()
    (refused,) = told(wire, "node-1", Refused)
    assert reason in refused.reason
    ending = wire.members["node-1"].ending
    assert ending is not None
    assert ending.how is End.REFUSED
    assert len(wire.run.membership) == 1
    wire.enter("node-2")
    wire.settle()
    assert wire.run.phase is Phase.BARRIER


def test_the_token_is_asked_for_before_anything_about_the_run_is_said() -> None:
    wire = started()
    (action,) = wire.inject("stranger", join("stranger", token="guess"))
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert "token" in action.message.reason
    assert "node-0" not in action.message.reason


def test_a_second_node_of_the_same_name_is_refused_and_the_first_takes_no_notice() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    (action,) = wire.inject("node-0~2", join("node-0", address="tcp://127.0.0.1:1"))
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert "already here (node-0 (pid 7 on atlas))" in action.message.reason
    assert action.peer == "node-0~2"
    wire.settle()
    assert wire.members["node-0"].state is State.WAITING
    assert told(wire, "node-0", Refused) == []


@pytest.mark.parametrize("message", [Failed(reason="x"), Leave(), Ready(step=7), Saved(step=50)])
def test_what_a_namesake_says_does_not_count_as_the_members(message: Any) -> None:
    wire = started()
    wire.inject("node-0~2", join("node-0", token="wrong"))
    assert wire.inject("node-0~2", message) == []
    assert wire.event(PeerLost("node-0~2", "gone")) == [Forget("node-0~2")]
    wire.event(Faulted("node-0~2", "nonsense"))
    wire.play()
    assert wire.outcome == (True, "")


def test_members_are_called_by_their_plain_names() -> None:
    wire = Wire(config(), plan(rounds_for=lambda step: ["weights"] if step == 1 else []))
    for peer in ("node-0~a", "node-1~b"):
        wire.enter(peer)
    wire.settle()
    (roster,) = told(wire, "node-0~a", Roster)
    assert [(entry.name, entry.peer) for entry in roster.members] == [("node-0", "node-0~a"), ("node-1", "node-1~b")]
    wire.play(until=2)
    assert [set(record.nodes) for record in wire.records] == [{"node-0", "node-1"}] * 2
    wire.settle()
    wire.work("node-1~b")
    wire.settle()
    wire.advance(101)
    assert "step 3: node-0 not ready within 100 s of node-1; " in told(wire, "node-0~a", Stop)[0].reason


def test_who_asks_twice_to_join_is_answered_once() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    assert wire.inject("node-0", join("node-0")) == []
    assert len(wire.run.membership) == 1


@pytest.mark.parametrize(
    ("name", "peer"),
    [("node-9", "node-0"), ("coordinator", "coordinator"), ("coordinator", "coordinator~1"), ("node-0", "node-0~no!")],
)
def test_a_name_must_be_that_of_the_connection_and_not_the_coordinators(name: str, peer: str) -> None:
    wire = Wire(config(), plan())
    (action,) = wire.inject(peer, join(name))
    assert isinstance(action, Send)
    assert isinstance(action.message, Refused)
    assert len(wire.run.membership) == 0


def test_a_late_joiner_is_told_that_the_run_is_full() -> None:
    wire = started()
    wire.enter("node-2")
    wire.settle()
    assert "the run is full: it has its 2 nodes (node-0, node-1)" in told(wire, "node-2", Refused)[0].reason
    wire.play()
    assert wire.outcome is not None
    assert wire.outcome.ok


def test_an_incomplete_rendezvous_ends_with_the_names_of_both_kinds() -> None:
    wire = Wire(config(nodes=4), plan())
    wire.enter("node-0")
    wire.enter("node-2")
    wire.settle()
    wire.advance(59)
    assert wire.run.phase is Phase.JOINING
    wire.advance(2)
    reason = "after 60 s 2 of 4 nodes joined: node-0, node-2; still waited for node-1, node-3"
    assert told(wire, "node-0", Stop) == [Stop(ok=False, reason=reason)]
    wire.play()
    assert wire.outcome == (False, reason)


def test_with_names_of_their_own_the_missing_are_counted() -> None:
    wire = Wire(config(nodes=3), plan())
    wire.enter("berlin")
    wire.settle()
    wire.advance(61)
    assert "1 of 3 nodes joined: berlin; still waited for 2 more" in told(wire, "berlin", Stop)[0].reason


def test_who_goes_before_the_start_frees_the_place() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.settle()
    wire.say("node-0", Leave())
    wire.enter("node-1")
    wire.settle()
    wire.kill("node-1")
    wire.advance(11)
    assert len(wire.run.membership) == 0
    wire.enter("node-2")
    wire.enter("node-3")
    wire.settle()
    assert told(wire, "node-3", Roster)[0].generation == 6


def test_more_nodes_than_chunks_is_said_before_anybody_joins() -> None:
    with pytest.raises(ConfigError, match=r"more nodes than chunks \(4\)"):
        Run(config(nodes=5), plan(), 0.0)


# Steps.


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
    reason = told(wire, "node-1", Stop)[0].reason
    assert "step 0: node-0, node-2 not ready within 100 s of node-1" in reason


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
    for name in wire.members:  # the culprit too: it lives, and its user wants to know
        assert "node-0: ready for step 40 where the run is at step 0" in told(wire, name, Stop)[0].reason


def test_nonsense_before_the_start_costs_only_its_own_place() -> None:
    wire = Wire(config(), plan())
    wire.enter("node-0")
    wire.enter("node-1", token="wrong")
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


def in_round(nodes: int = 3) -> Wire:
    wire = started(nodes=nodes, rounds_for=lambda step: ["weights"])
    for name in wire.members:
        wire.work(name)
    wire.settle()
    assert wire.run.phase is Phase.ROUND
    return wire


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
        assert reason in told(wire, name, Abort)[0].reason
        assert reason in told(wire, name, Stop)[0].reason
    wire.play()
    assert wire.outcome is not None
    assert not wire.outcome.ok


def test_a_round_has_a_deadline_that_names_who_did_not_vote() -> None:
    wire = in_round()
    wire.work("node-2")
    wire.settle()
    wire.advance(101)
    reason = "step 0, averaging of weights: node-0, node-1 did not finish within 100 s of the first"
    assert told(wire, "node-2", Abort) == [Abort(round_id=0, reason=reason)]
    assert wire.members["node-0"].committed is None


@pytest.mark.parametrize(
    ("vote", "says"),
    [(Vote(round_id=0, ok=True), "two votes on round 0"), (Vote(round_id=1, ok=True), "open is 0")],
)
def test_a_second_vote_or_one_on_another_round_is_nonsense(vote: Vote, says: str) -> None:
    wire = in_round()
    wire.work("node-0")
    wire.settle()
    wire.inject("node-0", vote)
    assert says in str(wire.faults[0])
    assert wire.run.phase is Phase.STOPPING


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


@pytest.mark.parametrize("message", [Saved(step=9), Saved(step=1)])
def test_a_part_of_no_such_step_or_a_second_one_is_nonsense(message: Saved) -> None:
    wire = started()
    wire.play(until=1)
    wire.say("node-0", Saved(step=1))
    wire.settle()
    wire.inject("node-0", message)
    assert wire.faults
    wire.play()
    assert wire.outcome is not None
    assert "node-0" in wire.outcome.reason


# Loss.


@pytest.mark.parametrize("phase", [Phase.BARRIER, Phase.ROUND])
def test_a_killed_node_is_named_to_the_others_with_the_last_complete_step(phase: Phase) -> None:
    wire = started(nodes=3, steps=9, rounds_for=lambda step: ["weights"] if phase is Phase.ROUND else [])
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
    ],
)
def test_who_goes_mid_run_ends_it_for_all_with_its_reason(message: Failed | Leave, text: str) -> None:
    wire = started()
    wire.play(until=1)
    wire.say("node-0", message)
    wire.settle()
    assert text in told(wire, "node-1", Stop)[0].reason


def test_the_transport_may_find_a_loss_first() -> None:
    wire = started()
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


# Every pair.

EVENTS: list[Event] = [
    *(
        Received("node-0", message)
        for message in (
            join("node-0"),
            Ready(step=0),
            Vote(round_id=0, ok=True),
            Saved(step=0),
            Changed(number=1),
            Ask(token="t", version=2),
            Leave(),
            Failed(reason="x"),
            Heartbeat(),
        )
    ),
    PeerLost("node-0", "x"),
    Faulted("node-0", "x"),
    Cancelled("x"),
    Tick(),
]


def in_phase(phase: Phase) -> Run:
    if phase is Phase.JOINING:
        wire = Wire(config(), plan())
        wire.enter("node-0")
        wire.settle()
    elif phase is Phase.ROUND:
        wire = in_round(2)
    else:
        wire = started()
    wire.event(Received("(operator)~1", Ask(token="t", version=2, change=Reset())))
    if phase in (Phase.STOPPING, Phase.FINISHED):
        wire.event(Cancelled("over"))
    if phase is Phase.FINISHED:
        wire.now_s += 9.9
        wire.run.membership.hear("node-0", wire.now_s)
        wire.now_s = 11.0
        wire.event(Tick())
    assert wire.run.phase is phase
    return wire.run


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, EVENTS)))
def test_every_pair_is_a_move_of_the_table_or_a_protocol_error_that_changes_nothing(phase: Phase, event: Event) -> None:
    run = in_phase(phase)
    kind = type(event.message) if isinstance(event, Received) else type(event)
    now_s = 11.0 if phase is Phase.FINISHED else 0.5
    if (phase, kind) in TABLE:
        run.handle(event, now_s)
        return
    with pytest.raises(ProtocolError) as caught:
        run.handle(event, now_s)
    assert caught.value.peer == "node-0"
    assert kind.__name__ in str(caught.value)
    assert run.phase is phase


def test_every_phase_lets_nobody_in_by_accident() -> None:
    for phase in Phase:
        if phase is not Phase.JOINING:
            run = in_phase(phase)
            (action,) = run.handle(Received("late", join("late")), 0.5)
            assert isinstance(action, Send)
            assert isinstance(action.message, Refused)


def test_strangers_are_not_listened_to() -> None:
    wire = started()
    for message in (Ready(step=0), Vote(round_id=0, ok=False), Leave(), Failed(reason="x"), Heartbeat()):
        assert wire.inject("stranger", message) == []
    assert wire.run.phase is Phase.BARRIER
    assert isinstance(join("x"), Join)


# Interleavings.


@settings(max_examples=120, deadline=None)
@given(data=st.data(), nodes=st.integers(1, 4), every=st.integers(1, 3), kill=st.booleans())
def test_any_interleaving_ends_well_or_names_the_dead(data: st.DataObject, nodes: int, every: int, kill: bool) -> None:
    """Deliveries, work and time in any order: all commit or none, all end alike, nothing is a protocol error."""
    rounds = ["weights", "moments"]
    wire = Wire(config(nodes=nodes), plan(steps=4, rounds_for=lambda step: [] if step % every else rounds))
    for rank in range(nodes):
        wire.enter(f"node-{rank}")
    victim = "node-0"
    kill_at = data.draw(st.integers(0, 120)) if kill and nodes > 1 else -1
    for turn in range(600):
        if wire.outcome is not None:
            break
        if turn == kill_at:
            wire.kill(victim)
        moves = [("up", n) for n in wire.up if wire.up[n]] + [("down", n) for n in wire.down if wire.down[n]]
        moves += [("work", n) for n in wire.members if wire.members[n].state in (State.RUNNING, State.DONE)]
        moves = [(verb, name) for verb, name in moves if name not in wire.dead]
        if not moves:
            wire.advance(1.0)
            continue
        verb, name = data.draw(st.sampled_from(moves))
        {"up": wire.deliver_up, "down": wire.deliver_down, "work": wire.work}[verb](name)
        wire.now_s += 0.001
    if wire.outcome is None:  # slow draws: finish it in order
        wire.play()
        wire.advance(60.0)
        wire.play()
        wire.advance(60.0)
    assert wire.outcome is not None
    assert wire.faults == []
    survivors = [name for name in wire.members if name not in wire.dead]
    commits = {tuple(told(wire, name, Commit)) for name in survivors}
    if wire.outcome.ok:
        assert len(commits) == 1
        assert all(len(told(wire, name, Go)) == 4 for name in survivors)
        return
    assert victim in wire.dead
    assert victim in wire.outcome.reason or "still waited for" in wire.outcome.reason
    for name in survivors:
        ending = wire.members[name].ending
        assert ending is not None
        assert ending.how is End.ABORTED
        assert ending.reason == wire.outcome.reason
