"""The node's machine alone: every pair, and what it believes of a coordinator that errs."""

from __future__ import annotations

import itertools
from typing import TypeVar

import msgspec
import pytest
from helpers.fake_coordinator import config, join

from coordinator.member import LOCAL, REMOTE, End, Member, State
from coordinator.messages import (
    Alter,
    Changed,
    Commit,
    CoordinatorMessage,
    Evicted,
    Failed,
    Go,
    Heartbeat,
    Join,
    Leave,
    NodeMessage,
    Pause,
    Ready,
    Refused,
    Roster,
    RosterEntry,
    Round,
    Saved,
    Stop,
    Suspect,
    Vote,
    Welcome,
)
from netem.changes import Reset
from netem.errors import ProtocolError
from netem.schedule import Timed

WELCOME = Welcome(rank=-1, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0)
ENTRIES = [
    RosterEntry(name="a", peer="a~0", rank=0, address="x"),
    RosterEntry(name="b", peer="b~0", rank=1, address="y"),
]
ROSTER = Roster(generation=2, members=ENTRIES, assignment=[[0], [1]])
LATER = Roster(generation=3, members=[msgspec.structs.replace(ENTRIES[1], rank=0)], assignment=[[0, 1]])
ROUND = Round(round_id=5, kind="weights", weights=[0.5, 0.5])
GO = Go(step=3, generation=2, cursor=12, rounds=[ROUND])
ALTER = Alter(number=1, timed=Timed(at_s=1.0, change=Reset()))

T = TypeVar("T", bound=msgspec.Struct)

LOCAL_MESSAGES: list[NodeMessage] = [
    join("b"),
    Ready(step=3),
    Vote(round_id=5, ok=True),
    Saved(step=3),
    Suspect(peer="a~0", reason="x"),
    Changed(number=1),
    Leave(),
    Failed(reason="x"),
    Heartbeat(),
]
REMOTE_MESSAGES: list[CoordinatorMessage] = [
    WELCOME,
    Refused(reason="no"),
    LATER,
    GO,
    ALTER,
    Commit(round_id=5),
    Pause(generation=3, reason="x"),
    Evicted(reason="x"),
    Stop(ok=False, reason="x"),
    Heartbeat(),
]


def in_state(state: State) -> Member:
    """A member led to `state` by the shortest legal way; RUNNING has a round open."""
    member = Member(config())
    way: list[NodeMessage | CoordinatorMessage] = [join("b"), WELCOME, ROSTER, Ready(step=3), GO]
    stops = {
        State.NEW: 0,
        State.JOINING: 1,
        State.WAITING: 2,
        State.READY: 4,
        State.RUNNING: 5,
    }
    if state is State.VOTED:
        way.append(Vote(round_id=5, ok=True))
    elif state in (State.DONE, State.GONE):
        way.append(Stop(ok=True))
    if state is State.GONE:
        way.append(Leave())
    for message in way[: stops.get(state, len(way))]:
        if isinstance(message, Join | Ready | Vote | Leave):
            member.send(message, 0.0)
        else:
            assert not isinstance(message, Saved | Failed)
            member.receive(message, 0.0)
    assert member.state is state
    return member


@pytest.mark.parametrize(("state", "message"), list(itertools.product(State, LOCAL_MESSAGES)))
def test_every_local_pair(state: State, message: NodeMessage) -> None:
    member = in_state(state)
    # A Ready from RUNNING here has a round open: legal as a pair, wrong in its turn.
    # A Join is legal when the run is over for this node, but only where it was evicted.
    out_of_turn = (State.RUNNING, Ready), (State.DONE, Join)
    if (state, type(message)) in LOCAL and (state, type(message)) not in out_of_turn:
        member.send(message, 0.0)
        return
    with pytest.raises(ProtocolError) as caught:
        member.send(message, 0.0)
    assert caught.value.peer == ""
    assert member.state is state


@pytest.mark.parametrize(("state", "message"), list(itertools.product(State, REMOTE_MESSAGES)))
def test_every_remote_pair(state: State, message: CoordinatorMessage) -> None:
    member = in_state(state)
    live = (State.WAITING, State.READY, State.RUNNING, State.VOTED)
    # A refusal may be for another node, and a verdict may be said again, by a coordinator that was started again.
    again = isinstance(message, Commit) and state is not State.VOTED
    out_of_turn = state in live and (isinstance(message, Refused) or again)
    if (state, type(message)) in REMOTE and not out_of_turn:
        member.receive(message, 0.0)
        return
    with pytest.raises(ProtocolError) as caught:
        member.receive(message, 0.0)
    assert caught.value.peer == "coordinator"
    assert member.state is state


def changed(message: T, **changes: object) -> T:
    return type(message)(**({f: getattr(message, f) for f in message.__struct_fields__} | changes))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (State.WAITING, changed(ROSTER, members=ENTRIES[:1])),
        (State.WAITING, changed(ROSTER, assignment=[[0], []])),
        (State.WAITING, changed(ROSTER, assignment=[[0], [0]])),
        (State.WAITING, changed(ROSTER, members=[ENTRIES[0], ENTRIES[0]])),
        (State.WAITING, changed(ROSTER, members=[ENTRIES[0], RosterEntry(name="c", peer="c~0", rank=1, address="y")])),
        (State.WAITING, changed(ROSTER, members=[ENTRIES[1], RosterEntry(name="c", peer="c~0", rank=1, address="y")])),
        (State.WAITING, changed(ROSTER, members=[changed(ENTRIES[0], peer="c~0"), ENTRIES[1]])),
        *((state, ROSTER) for state in (State.RUNNING, State.READY, State.VOTED)),  # not of a later generation
        *((state, changed(LATER, generation=1)) for state in (State.RUNNING, State.READY, State.VOTED)),
        (State.READY, changed(LATER, assignment=[[0], [1]])),
        (State.READY, changed(GO, step=4)),
        (State.READY, changed(GO, generation=1)),
        (State.READY, changed(GO, rounds=[Round(round_id=5, kind="w", weights=[1.0])])),
        (State.RUNNING, changed(ALTER, number=2)),
        (State.VOTED, Commit(round_id=6)),
        (State.RUNNING, Pause(generation=2, reason="x")),
    ],
)
def test_what_does_not_fit_is_not_believed(state: State, message: CoordinatorMessage) -> None:
    member = in_state(state)
    with pytest.raises(ProtocolError):
        member.receive(message, 0.0)
    assert member.state is state


@pytest.mark.parametrize("state", [State.RUNNING, State.READY, State.VOTED])
def test_a_later_roster_begins_anew_whatever_was_under_way(state: State) -> None:
    member = in_state(state)
    member.receive(LATER, 7.0)
    assert (member.state, member.rank, member.roster, member.go) == (State.RUNNING, 0, LATER, None)
    assert member.began_s == 0.0  # the network's time goes on
    with pytest.raises(ProtocolError, match="open is no round"):
        member.send(Vote(round_id=5, ok=True), 7.0)
    assert member.send(Ready(step=1), 7.0) == [Ready(step=1, generation=3)]
    with pytest.raises(ProtocolError, match="Go of generation 2, the roster is of 3"):
        member.receive(changed(GO, step=1), 7.0)
    member.receive(Go(step=1, generation=3, cursor=4), 7.0)
    assert member.send(Ready(step=2), 7.0) == [Ready(step=2, generation=3)]


@pytest.mark.parametrize("state", [State.RUNNING, State.READY, State.VOTED])
def test_a_pause_ends_the_generation_and_a_roster_the_pause(state: State) -> None:
    member = in_state(state)
    member.receive(Pause(generation=3, reason="1 of at least 2 nodes are left"), 7.0)
    assert (member.state, member.generation, member.go) == (State.WAITING, 3, None)
    assert member.send(Saved(step=3), 7.0) == []
    with pytest.raises(ProtocolError):
        member.receive(changed(LATER, generation=3), 8.0)
    member.receive(changed(LATER, generation=4), 8.0)
    assert (member.state, member.rank, member.began_s) == (State.RUNNING, 0, 0.0)


@pytest.mark.parametrize("state", [State.WAITING, State.RUNNING, State.READY, State.VOTED])
def test_who_is_evicted_says_nothing_more_and_may_join_anew(state: State) -> None:
    member = in_state(state)
    member.receive(Evicted(reason="silent for 10 s"), 7.0)
    assert member.ending == (End.EVICTED, "silent for 10 s")
    assert member.tick(8.0) == member.send(Suspect(peer="a~0", reason="x"), 8.0) == []
    assert member.send(join("b"), 9.0) == [join("b")]
    member.receive(Evicted(reason="silent for 10 s"), 9.0)  # an answer to a heartbeat that was still on its way
    member.receive(WELCOME, 9.0)
    member.receive(changed(ROSTER, generation=9, elapsed_s=30.0), 40.0)
    assert (member.state, member.rank, member.began_s) == (State.RUNNING, 1, 10.0)


def test_a_process_that_was_stopped_reads_what_came_meanwhile_before_it_gives_up() -> None:
    member = in_state(State.RUNNING)
    member.tick(1.0)
    assert member.tick(100.0) == [Heartbeat()]
    assert member.ending is None
    for now_s in range(101, 120):
        member.tick(float(now_s))
    assert member.ending == (End.ABORTED, "the coordinator was lost: silent for 10 s")


@pytest.mark.parametrize("message", [Ready(step=4), Vote(round_id=6, ok=True)])
def test_a_trainer_out_of_turn_is_told(message: NodeMessage) -> None:
    member = in_state(State.RUNNING)
    with pytest.raises(ProtocolError, match="round 5"):
        member.send(message, 0.0)


def test_after_the_rounds_only_the_next_step_follows() -> None:
    member = in_state(State.VOTED)
    member.receive(Commit(round_id=5), 0.0)
    assert member.committed == 5
    with pytest.raises(ProtocolError, match="ready for step 7 after step 3"):
        member.send(Ready(step=7), 0.0)
    assert member.send(Ready(step=4), 0.0) == [Ready(step=4, generation=2)]


def test_a_refusal_meant_for_a_namesake_is_not_taken() -> None:
    member = in_state(State.JOINING)
    member.receive(Refused(reason="no", address="tcp://elsewhere:1"), 0.0)
    assert member.state is State.JOINING
    member.receive(Refused(reason="no", address=join("b").address), 0.0)
    assert member.ending == (End.REFUSED, "no")


def test_a_late_arrival_time_does_not_turn_the_clock_back() -> None:
    member = in_state(State.READY)
    member.receive(Heartbeat(), 9.0)
    member.receive(Heartbeat(), 1.0)
    for now_s in (12.0, 15.0, 18.0):
        member.tick(now_s)
    assert member.ending is None
    member.tick(19.5)
    assert member.ending is not None


def test_a_farewell_is_said_once() -> None:
    member = in_state(State.DONE)
    assert member.send(Leave(), 0.0) == [Leave()]
    assert member.send(Leave(), 0.0) == []
    assert member.send(Failed(reason="x"), 0.0) == []


def test_heartbeats_only_while_in_the_run() -> None:
    assert in_state(State.JOINING).tick(5.0) == []
    assert in_state(State.RUNNING).tick(5.0) == [Heartbeat()]
    assert in_state(State.DONE).tick(5.0) == []


def test_a_member_waits_for_a_coordinator_that_was_lost_and_hears_its_last_word_again() -> None:
    """It goes on in the generation that a coordinator which was started again begins."""
    member = Member(config(return_timeout_s=120.0))
    member.send(join("b"), 0.0)
    member.receive(WELCOME, 0.0)
    member.receive(ROSTER, 0.0)
    for now_s in range(1, 130):
        member.tick(float(now_s))
    assert member.ending is None
    member.receive(WELCOME, 129.0)
    member.receive(Commit(round_id=7, again=True), 129.0)
    later = changed(ROSTER, generation=ROSTER.generation + 1)
    member.receive(later, 129.0)
    assert (member.state, member.roster) == (State.RUNNING, later)
    for now_s in range(129, 261):
        member.tick(float(now_s))
    assert member.ending == (End.ABORTED, "the coordinator was lost: silent for 130 s")
