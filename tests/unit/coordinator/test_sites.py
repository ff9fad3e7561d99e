"""Nodes that are sites of several processes: columns, digests and votes by column, and sites that leave as a whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.fake_coordinator import Wire, config, plan, told

from coordinator.barrier import Barrier, outvoted
from coordinator.events import JOINED, LOST
from coordinator.messages import Evicted, Go, Ready, Refused, Roster, Round, Saved, Stop, Vote
from coordinator.rounds import Ballot, RoundState
from coordinator.run import Phase
from netem.errors import ConfigError


def enter(wire: Wire, site: str, local_rank: int, processes: int = 2, **changes: Any) -> None:
    wire.enter(f"{site}.{local_rank}", site=site, local_rank=local_rank, processes=processes, **changes)


def sites(nodes: int = 2, settings: dict[str, Any] | None = None, **plan_changes: Any) -> Wire:
    """A complete world of sites of two processes each."""
    wire = Wire(config(nodes=nodes, shards=2, **(settings or {})), plan(**plan_changes))
    for local_rank in (1, 0):
        for site in range(nodes):
            enter(wire, f"node-{site}", local_rank)
    wire.settle()
    return wire


def test_each_member_gets_the_roster_of_its_column_once_all_processes_are_here() -> None:
    wire = Wire(config(nodes=2, shards=2), plan())
    for site, local_rank in (("b", 1), ("a", 0), ("b", 0)):
        enter(wire, site, local_rank)
        wire.settle()
        assert wire.run.phase is Phase.JOINING
    assert "3 of 4 processes of 2 sites joined: a.0, b.0, b.1; still waiting for 1 more" in (
        wire.run.membership.waiting_text()
    )
    enter(wire, "a", 1)
    wire.settle()
    for column in (0, 1):
        for rank, site in enumerate(("a", "b")):
            (roster,) = told(wire, f"{site}.{column}", Roster)
            assert [(entry.name, entry.rank) for entry in roster.members] == [(f"a.{column}", 0), (f"b.{column}", 1)]
            assert roster.assignment == [[0, 1], [2, 3]]
            assert wire.members[f"{site}.{column}"].rank == rank


def test_a_site_asks_for_its_rank_by_any_of_its_processes() -> None:
    wire = Wire(config(nodes=2, shards=2), plan())
    for site, rank in (("a", 1), ("b", 0)):
        for local_rank in (0, 1):
            enter(wire, site, local_rank, rank=rank)
    wire.settle()
    assert {name: member.rank for name, member in wire.members.items()} == {"a.0": 1, "a.1": 1, "b.0": 0, "b.1": 0}


def test_a_run_of_sites_goes_to_its_end() -> None:
    wire = sites(rounds_for=lambda step: ["weights"])
    wire.play()
    assert wire.outcome == (True, "")
    assert [record.step for record in wire.records] == [1, 2, 3]
    assert sorted(wire.records[0].nodes) == ["node-0.0", "node-0.1", "node-1.0", "node-1.1"]
    for name in wire.members:
        assert [go.rounds[0].weights for go in told(wire, name, Go)] == [[0.5, 0.5]] * 3
        assert told(wire, name, Stop) == [Stop(ok=True)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"local_rank": 0, "processes": 1},
            "of a site of 1 process, and the sites of this run have 1 stages",
        ),
        ({"local_rank": 0, "processes": 4}, "of a site of 4 processes, .* torchrun with 2 processes"),
        ({"local_rank": 2, "processes": 2}, "is process 2 of a site of 2 processes"),
    ],
)
def test_an_unequal_site_is_refused_with_the_reason(changes: dict[str, Any], says: str) -> None:
    wire = Wire(config(nodes=2, shards=2), plan())
    enter(wire, "a", **changes)
    wire.settle()
    (refused,) = told(wire, f"a.{changes['local_rank']}", Refused)
    assert re.search(says, refused.reason)


def test_a_plain_node_is_refused_by_sites_and_a_site_by_plain_nodes() -> None:
    wire = Wire(config(nodes=2, shards=2), plan())
    wire.enter("node-0")
    plain = Wire(config(nodes=2), plan())
    enter(plain, "a", 0)
    for world, name in ((wire, "node-0"), (plain, "a.0")):
        world.settle()
        (refused,) = told(world, name, Refused)
        assert "the sites of this run have" in refused.reason


def test_a_process_that_is_here_already_and_a_site_too_many_are_refused() -> None:
    wire = Wire(config(nodes=1, shards=2), plan())
    enter(wire, "a", 0)
    wire.enter("other", site="a", local_rank=0, processes=2)
    enter(wire, "b", 0)
    wire.settle()
    assert "process 0 of site a is already here (a.0" in told(wire, "other", Refused)[0].reason
    assert "the run is full: it has its 1 nodes (a)" in told(wire, "b.0", Refused)[0].reason


def test_a_lost_process_takes_its_site_with_it_and_the_other_sites_go_on() -> None:
    wire = sites(nodes=3, steps=4)
    wire.play(until=1)
    wire.kill("node-1.0")
    wire.advance(15)
    evicted, *_ = told(wire, "node-1.1", Evicted)
    assert "node-1.0 (pid 7 on atlas) was lost" in evicted.reason
    assert "site node-1 leaves as a whole" in evicted.reason
    for column in (0, 1):
        roster = told(wire, f"node-0.{column}", Roster)[-1]
        assert [entry.name for entry in roster.members] == [f"node-0.{column}", f"node-2.{column}"]
        assert len(roster.assignment) == 2
    wire.play()
    (fault,) = [fault for fault in wire.told if fault.kind == LOST]
    assert set(fault.nodes) == {"node-1.0", "node-1.1"}
    assert "has 2 nodes (node-0, node-2) with 3/1 chunks" in fault.done
    assert wire.outcome == (True, "")
    assert not wire.faults


def test_a_site_that_comes_back_waits_until_it_is_whole() -> None:
    wire = sites(steps=6)
    wire.play(until=1)
    wire.kill("node-1.1")
    wire.advance(15)
    enter(wire, "node-1", 0)
    wire.dead.discard("node-1.1")
    wire.play(until=3)
    assert [entry.name for entry in told(wire, "node-0.0", Roster)[-1].members] == ["node-0.0"]
    enter(wire, "node-1", 1)
    wire.play()
    for column in (0, 1):
        roster = told(wire, f"node-0.{column}", Roster)[-1]
        assert [(entry.name, entry.joins) for entry in roster.members] == [
            (f"node-0.{column}", False),
            (f"node-1.{column}", True),
        ]
    (joined,) = [fault for fault in wire.told if fault.kind == JOINED]
    assert joined.nodes == ("node-1.0", "node-1.1")
    assert wire.outcome == (True, "")
    assert not wire.faults


def test_stages_are_refused_until_a_run_has_them() -> None:
    with pytest.raises(ConfigError, match=r"coordinator\.stages = 4: expected 1"):
        Wire(config(stages=4), plan())


def test_too_few_sites_pause_the_run() -> None:
    wire = sites(settings={"min_nodes": 2})
    wire.play(until=1)
    wire.kill("node-1.0")
    wire.advance(15)
    assert wire.run.phase is Phase.PAUSED
    assert any("1 of at least 2 nodes are left" in text for text in wire.said)


def test_a_checkpoint_is_complete_once_all_processes_have_saved() -> None:
    wire = sites()
    wire.play(until=1)
    for name in [*wire.members][:-1]:
        wire.say(name, Saved(step=1))
    wire.settle()
    assert wire.checkpoints == []
    wire.say([*wire.members][-1], Saved(step=1))
    wire.settle()
    assert wire.checkpoints == [1]


PEERS = ["a.0", "a.1", "b.0", "b.1", "c.0", "c.1"]


def test_digests_are_compared_within_a_column() -> None:
    barrier = Barrier(PEERS, 0, 1.0, columns=2)
    for peer in PEERS:
        barrier.ready(peer, Ready(step=0, digests={"weights": f"of {peer[-1]}"}), 0.0)
    assert barrier.disagreement() is None
    odd = Barrier(PEERS, 0, 1.0, columns=2)
    for peer in PEERS:
        odd.ready(peer, Ready(step=0, digests={"weights": "x" if peer == "b.1" else f"of {peer[-1]}"}), 0.0)
    found = odd.disagreement()
    assert found is not None
    assert found.outvoted == ["b.1"]
    assert "a.1, c.1 have of 1; b.1 has x" in found.reason
    assert outvoted({"a": "x", "b": "x", "c": "y"}, 3) == ["c"]


@pytest.mark.parametrize(("odd", "state"), [("", RoundState.COMMITTED), ("c.0", RoundState.ABORTED)])
def test_votes_are_compared_within_a_column(odd: str, state: RoundState) -> None:
    ballot = Ballot(PEERS, Round(round_id=3, kind="weights", weights=[1.0]), 0, 1.0, columns=2)
    for peer in PEERS:
        ballot.vote(peer, Vote(round_id=3, ok=True, digest="odd" if peer == odd else f"of {peer[-1]}"), 0.0)
    assert ballot.state is state
    assert ("c.0 has odd" in ballot.reason) == bool(odd)
