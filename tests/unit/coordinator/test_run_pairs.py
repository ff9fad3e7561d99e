"""Every pair of phase and event, and any order of deliveries."""

from __future__ import annotations

import itertools

import pytest
from helpers.fake_coordinator import Wire, config, in_round, join, plan, started, told
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.events import Cancelled, Event, Faulted, PeerLost, Received, Send, Tick
from coordinator.member import End, State
from coordinator.messages import (
    PROTOCOL_VERSION,
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
    Saved,
    Suspect,
    Vote,
)
from coordinator.run import TABLE, Phase, Run
from netem.changes import Reset
from netem.errors import ProtocolError

EVENTS: list[Event] = [
    *(
        Received("node-0", message)
        for message in (
            join("node-0"),
            Ready(step=0, generation=2),
            Vote(round_id=0, ok=True, generation=2),
            Saved(step=0, generation=2),
            Suspect(peer="node-1", reason="x", generation=2),
            Changed(number=1),
            Ask(version=PROTOCOL_VERSION),
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
    elif phase is Phase.PAUSED:
        wire = started(settings={"min_nodes": 2})
        wire.event(PeerLost("node-1", "x"))
    else:
        wire = started()
    wire.event(Received("(operator)~1", Ask(version=PROTOCOL_VERSION, change=Reset())))
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
    if phase is Phase.PAUSED and kind in (Ready, Vote, Saved, Suspect):
        assert run.handle(event, now_s) == [], "it belongs to a generation that is over"
        return
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
        if phase not in (Phase.JOINING, Phase.PAUSED):
            run = in_phase(phase)
            (action,) = run.handle(Received("late", join("late")), 0.5)
            assert isinstance(action, Send)
            assert isinstance(action.message, Refused)


def test_strangers_are_not_listened_to() -> None:
    wire = started()
    for message in (
        Ready(step=0),
        Vote(round_id=0, ok=False),
        Suspect(peer="node-0", reason="x"),
        Leave(),
        Heartbeat(),
    ):
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
        assert len(commits) == 1, "every round happened on all who were left, or on none"
        assert all(told(wire, name, Go)[-1].step == 3 for name in survivors)
        assert [record.step for record in wire.records] == [1, 2, 3, 4], "each step counts once"
        return
    assert victim in wire.dead
    assert "still waiting for" in wire.outcome.reason
    for name in survivors:
        ending = wire.members[name].ending
        assert ending is not None
        assert ending.how is End.ABORTED
        assert ending.reason == wire.outcome.reason
