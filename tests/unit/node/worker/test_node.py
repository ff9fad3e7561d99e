"""A node's life as a loop over worlds, and how each world is built over its endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.worlds import tiny_config

from coordinator.messages import Roster, RosterEntry
from netem.counters import LinkCounters
from netem.errors import ConfigError, GenerationOver, PeerLate, ProtocolError, RunAborted
from netem.sockets import advertised
from node.exchange.inbox import Inbox
from node.site.site import ALONE
from node.train.from_config import payload_format
from node.train.ring_formats import FLOAT32
from node.worker.machine import Machine, share_cores
from node.worker.node import Place, _Made, _train
from node.worker.world_builder import WorldBuilder

PLACE = Place("tcp://127.0.0.1:1", "tcp://127.0.0.1:0", "", "node-0", -1)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that torch is given; it keeps its own, on which the last bits of other tests depend."""
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


def roster(generation: int, chunks: list[list[int]], *names: str, start_step: int = 0, moved: str = "") -> Roster:
    members = [
        RosterEntry(name=name, peer=f"{name}~1", rank=rank, address=f"tcp://{name}{moved}:1")
        for rank, name in enumerate(names)
    ]
    return Roster(generation=generation, start_step=start_step, members=members, assignment=chunks)


class Endpoint:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def set_generation(self, generation: int) -> None:
        self.asked.append(("generation", generation))

    def send(self, peer: str, tag: bytes, buffers: Any, *, flow: int, timeout_s: float = 0.0) -> None:
        self.asked.append(("send", peer))

    def share(self, secret: str) -> None:
        """Members do not prove anything here."""

    def connect(self, peer: str, address: str, *, key: str, encrypted: bool) -> None:
        self.asked.append(("connect", peer, address))

    def forget(self, peer: str) -> None:
        self.asked.append(("forget", peer))

    def counters(self) -> dict[str, LinkCounters]:
        return {}

    def door(self) -> None:
        """All may call."""


class Agreed:
    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        """Every round is agreed on."""


def test_each_world_has_its_own_members_and_what_lasts_is_told_of_the_change() -> None:
    config = tiny_config()
    payload, endpoint = payload_format(config), Endpoint()
    inbox = Inbox(payload, 1 << 20)
    machine = Machine(torch.device("cpu"))
    builder = WorldBuilder(
        *(endpoint, inbox, payload, Agreed(), 30.0),  # type: ignore[arg-type]
        *(config.run, "corpus", machine, lambda own, step: 0.0),
    )
    first, _ = builder.build(1, roster(4, [[0], [1], [2, 3]], "ann", "bob", "cyd"))
    assert endpoint.asked == [
        ("generation", 4),
        ("connect", "ann~1", "tcp://ann:1"),
        ("connect", "cyd~1", "tcp://cyd:1"),
    ]
    assert (first.rank, first.share, first.exchange.own) == (1, 0.25, (1,))
    endpoint.asked.clear()
    second, meter = builder.build(0, roster(6, [[0, 3], [1, 2]], "bob", "cyd", moved="-new"))
    assert endpoint.asked == [("generation", 6), ("forget", "ann~1"), ("connect", "cyd~1", "tcp://cyd-new:1")]
    assert (second.rank, second.share, second.exchange.own) == (0, 0.5, (0, 3))
    assert second.members.peers == ("bob~1", "cyd~1")
    assert second.exchange is not first.exchange
    assert second.averager is not first.averager
    assert meter.step_metrics()["averaging_s"] == 0.0
    with pytest.raises(ProtocolError, match="malformed tag"):  # a member, so looked at
        inbox.admit("cyd~1", 6, b"\xc1", 1)
    endpoint.asked.clear()
    alone, _ = builder.build(0, roster(7, [[0, 1, 2, 3]], "bob"))
    assert endpoint.asked == [("generation", 7), ("forget", "cyd~1")]
    assert alone.share == 1.0
    assert inbox.admit("cyd~1", 6, b"\xc1", 1) is None  # a member no more, so not even looked at


def test_a_world_is_built_once_no_thread_of_the_one_before_is_left() -> None:
    """It could send shards of its own round as messages of the new generation."""
    config = tiny_config()
    payload, endpoint = payload_format(config), Endpoint()
    inbox = Inbox(payload, 1 << 20)
    machine = Machine(torch.device("cpu"))
    builder = WorldBuilder(
        *(endpoint, inbox, payload, Agreed(), 30.0),  # type: ignore[arg-type]
        *(config.run, "corpus", machine, lambda own, step: 0.0),
    )
    first, _ = builder.build(0, roster(4, [[0], [1], [2, 3]], "ann", "bob", "cyd"))
    flight = first.averager.begin(9, torch.ones(12), FLOAT32)  # nobody answers
    inbox.announce(5)
    builder.build(0, roster(5, [[0, 1], [2, 3]], "ann", "bob"))
    assert flight.ring.done()
    assert isinstance(flight.ring.exception(), GenerationOver)
    assert endpoint.asked.index(("send", "bob~1")) < endpoint.asked.index(("generation", 5))
    builder.close()


class Rosters:
    """A session that gives these, and raises the last one where it is an error."""

    def __init__(self, *given: Roster | Exception) -> None:
        self._given = given
        self.suspected: list[tuple[str, str]] = []

    def suspect(self, peer: str, reason: str) -> None:
        self.suspected.append((peer, reason))

    def rosters(self) -> Iterator[tuple[int, Roster]]:
        for one in self._given:
            if isinstance(one, Exception):
                raise one
            yield 0, one


class Life:
    """A trainer and a world builder that note what happens to them; the trainer's steps are given."""

    def __init__(self, *steps: int | Exception) -> None:
        self.done = 0
        self.seen: list[tuple[Any, ...]] = []
        self._steps = list(steps)

    def build(self, rank: int, told: Roster) -> tuple[str, str]:
        return f"world {told.generation}", f"meter {told.generation}"

    def bring(self, trainer: object, world: str, told: Roster) -> None:
        self.seen.append(("bring", world, told.start_step))
        self.done = told.start_step

    def close(self) -> None:
        self.seen.append(("close",))

    def run(self, world: str, session: Rosters, meter: str) -> None:
        self.seen.append((world, meter))
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        self.done = step
        if self._steps:
            raise GenerationOver("the next roster is here")


def live(life: Life, *given: Roster | Exception) -> list[tuple[Any, ...]]:
    _train(_Made(life, life, life), Rosters(*given), PLACE, ALONE, 1.0)  # type: ignore[arg-type]
    return life.seen


def test_a_life_is_a_loop_over_worlds_and_who_joins_is_answered_until_each_one_ends() -> None:
    alone = [[0, 1, 2, 3]]
    assert live(Life(3, 6), roster(1, alone, "node-0"), roster(2, alone, "node-0", start_step=3)) == [
        ("bring", "world 1", 0),
        ("world 1", "meter 1"),
        ("close",),
        ("bring", "world 2", 3),
        ("world 2", "meter 2"),
        ("close",),
    ]


def test_what_else_ends_a_world_ends_the_life() -> None:
    alone = roster(1, [[0, 1, 2, 3]], "node-0")
    with pytest.raises(RunAborted, match="node-2 was lost"):
        live(Life(RunAborted("node-2 was lost")), alone, alone)
    with pytest.raises(ConfigError, match=r"^--join tcp://127\.0\.0\.1:1: the coordinator refuses"):
        live(Life(), ConfigError("the coordinator refuses this node"))
    with pytest.raises(ConfigError, match=r"^train\.lr"):
        live(Life(ConfigError("train.lr = 0: wrong")), alone)


@pytest.mark.parametrize("error", [PeerLate("cyd~1", "cyd is late"), ProtocolError("sent nonsense", peer="cyd~1")])
def test_a_member_that_is_late_or_sends_nonsense_is_reported_and_the_next_generation_awaited(
    error: PeerLate | ProtocolError,
) -> None:
    alone = [[0, 1, 2, 3]]
    life, session = Life(error, 6), Rosters(roster(1, alone, "node-0"), roster(2, alone, "node-0"))
    _train(_Made(life, life, life), session, PLACE, ALONE, 1.0)  # type: ignore[arg-type]
    assert session.suspected == [("cyd~1", str(error))]
    assert life.done == 6


@pytest.mark.parametrize("peer", ["", "coordinator"])
def test_nonsense_of_the_coordinator_or_of_this_side_ends_the_life(peer: str) -> None:
    with pytest.raises(ProtocolError, match="nonsense"):
        live(Life(ProtocolError("nonsense", peer=peer)), roster(1, [[0, 1, 2, 3]], "node-0"))


def test_nodes_on_the_same_cores_share_them_out(monkeypatch: pytest.MonkeyPatch, threads: list[int]) -> None:
    monkeypatch.setattr("netem.cores.share", lambda sharers: 12 // sharers)
    members = [
        RosterEntry(name=name, peer=f"{name}~1", rank=rank, address=f"tcp://{name}:1", cores=cores)
        for rank, (name, cores) in enumerate({"ann": "here", "bob": "there", "cyd": "here", "dan": "here"}.items())
    ]
    roster = Roster(generation=4, members=members, assignment=[[0], [1], [2], [3]])
    for rank in range(4):
        share_cores(0, rank, roster)
    assert threads == [4, 12, 4, 4]
    share_cores(5, 0, roster)
    assert threads[-1] == 5


@pytest.mark.parametrize(
    ("place", "address"),
    [
        ("", "tcp://10.0.0.7:5151"),
        ("home.example.org", "tcp://home.example.org:5151"),
        ("203.0.113.7:9000", "tcp://203.0.113.7:9000"),
        ("[2001:db8::7]", "tcp://[2001:db8::7]:5151"),
        ("[2001:db8::7]:9000", "tcp://[2001:db8::7]:9000"),
    ],
)
def test_peers_are_told_a_host_and_where_it_is_given_another_port(place: str, address: str) -> None:
    assert advertised("tcp://10.0.0.7:5151", place) == address


@pytest.mark.parametrize("place", ["tcp://a:1", "a:0", "a:70000", "*", "0.0.0.0:4", "two words", "2001:db8::7"])
def test_an_address_that_nobody_can_dial_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"--advertise .*expected HOST or HOST:PORT"):
        advertised("tcp://10.0.0.7:5151", place)
