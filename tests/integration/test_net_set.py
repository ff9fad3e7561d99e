"""`isthmus net set` and its sisters against a coordinator and two nodes on 127.0.0.1, which send to each other."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers.coordinators import Swarm, node_endpoint, settings, swarm

from coordinator.client import Session, sender
from coordinator.messages import COORDINATOR, control_buffer
from netem.errors import IsthmusError
from netem.network import CUT_BPS, Profile
from netem.schedule import Schedule
from node.cli import main

PATIENCE_S = 30.0
HOME = Profile(name="home", rate_bps=20e6, latency_s=0.005)


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the coordinator's settings, for the commands."""
    monkeypatch.setenv("ISTHMUS_TOKEN", settings().token)
    monkeypatch.setenv("ISTHMUS_OPERATOR", settings().operator)


class Node:
    """An endpoint with a session. What others send it lies in `arrived`, as (tag, bytes)."""

    def __init__(self, name: str, address: str) -> None:
        self.arrived: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        self.errors: list[IsthmusError] = []
        self.endpoint, access, lead = node_endpoint(name, settings(nodes=2), self, HOME)
        self.peer = self.endpoint.name
        self.endpoint.connect(COORDINATOR, address, answers_only=True, key=lead)
        self.session = Session(
            settings(nodes=2),
            sender(self.endpoint),
            run="test-run",
            name=name,
            address=self.endpoint.address,
            config_digest="cfg",
            access=access,
            on_network=lambda began, changes: self.endpoint.follow(Schedule(HOME).with_timed(changes), began),
        )

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return control_buffer(tag, total_bytes, peer) if peer == COORDINATOR else memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        if peer == COORDINATOR:
            self.session.on_message(buffer)
        else:
            self.arrived.put((tag, bytes(buffer)))

    def failed(self, error: IsthmusError) -> None:
        self.errors.append(error)

    def close(self) -> None:
        self.session.leave()
        self.endpoint.flush(1.0)
        self.endpoint.close()

    def await_rate(self, to: Node, rate_bps: float) -> None:
        """Wait until what leaves here to that node is shaped so."""
        deadline = time.monotonic() + PATIENCE_S
        while self.endpoint._engine.profile.link(self.peer, to.peer).rate_bps != rate_bps:
            assert time.monotonic() < deadline, self.endpoint._engine.profile
            time.sleep(0.01)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node, Swarm]]:
    """They have joined, and know each other."""
    with ExitStack() as stack:
        one = stack.enter_context(swarm(settings(nodes=2), 5, folder, HOME))
        (folder / "coordinator.address").write_text(one.address + "\n")
        nodes = []
        for rank in range(2):
            nodes.append(Node(f"node-{rank}", one.address))
            stack.callback(nodes[-1].close)
        with ThreadPoolExecutor(2) as pool:
            rosters = list(pool.map(lambda node: node.session.join()[1], nodes))
        for node, other, roster in zip(nodes, nodes[::-1], rosters, strict=True):
            node.endpoint.share(roster.secret)
            (entry,) = (entry for entry in roster.members if entry.peer == other.peer)
            node.endpoint.connect(entry.peer, entry.address, key=entry.key, encrypted=entry.encrypted)
        yield nodes[0], nodes[1], one


def message(number: int) -> tuple[bytes, bytes]:
    return b"%d" % number, number.to_bytes(4, "big") * 25_000


def send(node: Node, to: Node, numbers: range) -> None:
    for number in numbers:
        tag, payload = message(number)
        node.endpoint.send(to.peer, tag, [payload])


def received(node: Node, count: int) -> list[tuple[bytes, bytes]]:
    return [node.arrived.get(timeout=PATIENCE_S) for _ in range(count)]


def test_rates_change_and_links_are_cut_and_healed_while_messages_flow_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--coordinator", str(tmp_path)]
    with two_nodes(tmp_path) as (a, b, _):
        for node, other in ((a, b), (b, a)):
            send(node, other, range(20))
        assert main(["net", "set", *where, "--rate", "5 Mbit/s", "--pair", "node-0", "node-1"]) == 0
        said = capsys.readouterr().out
        assert "rate 5 Mbit/s between node-0 and node-1" in said
        assert "confirmed:   node-0, node-1" in said
        a.await_rate(b, 5e6)
        b.await_rate(a, 5e6)
        assert main(["net", "cut", "node-[0]", "node-1", *where]) == 0
        assert "; node-[0] and node-1 cut" in capsys.readouterr().out
        a.await_rate(b, CUT_BPS)
        b.await_rate(a, CUT_BPS)
        send(a, b, range(20, 25))
        assert main(["net", "set", *where, "--rate", "500 Mbit/s"]) == 0
        assert not a.endpoint.flush(0.3)
        assert main(["net", "heal", *where]) == 0
        assert received(b, 25) == [message(number) for number in range(25)]
        assert received(a, 20) == [message(number) for number in range(20)]
        a.await_rate(b, 500e6)
        assert main(["net", "reset", *where]) == 0
        a.await_rate(b, 20e6)
        capsys.readouterr()
        assert main(["net", "show", *where]) == 0
        shown = capsys.readouterr().out
        assert "network:     home (20 Mbit/s for each link" in shown
        assert re.findall(r"until now:   at [\d.]+ m?s (.*)", shown) == [
            "rate 5 Mbit/s between node-0 and node-1",
            "node-[0] and node-1 cut",
            "rate 500 Mbit/s everywhere",
            "all cuts healed",
            "back to the profile",
        ]
        assert a.endpoint.flush(PATIENCE_S)
        assert a.arrived.empty()
        assert b.arrived.empty()
        assert a.endpoint.counters()[b.peer].resent_bytes == b.endpoint.counters()[a.peer].resent_bytes == 0
        assert a.errors == b.errors == []


def test_a_node_that_is_cut_off_from_the_coordinator_is_healed_through_it(tmp_path: Path) -> None:
    where = ["--coordinator", str(tmp_path)]
    with two_nodes(tmp_path) as (a, b, one):
        assert main(["net", "cut", "*", "*", *where]) == 0
        a.await_rate(b, CUT_BPS)
        assert main(["net", "heal", *where]) == 0
        a.await_rate(b, 20e6)
        send(a, b, range(3))
        assert received(b, 3) == [message(number) for number in range(3)]
        assert not one.outcome.done()


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the mistake gets."""
    assert main(["net", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("isthmus net: error: ")


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with two_nodes(tmp_path) as (a, _, one):
        where = ["--coordinator", one.address]
        assert "'node-7' matches no node or site in this run; there are node-0, node-1, coordinator" in mistake(
            capsys, "set", *where, "--rate", "1 Mbit/s", "--node", "node-7"
        )
        assert "there is no cut between node-0 and node-1" in mistake(capsys, "heal", "node-0", "node-1", *where)
        assert "--rate = '1 Mbps': 'Mbps' is not a unit" in mistake(capsys, "set", *where, "--rate", "1 Mbps")
        assert mistake(capsys, "set", *where) == "set: expected --rate or --latency, or both"
        assert "two different nodes" in mistake(capsys, "cut", "node-0", "node-0", *where)
        assert "heal node-0: expected two nodes" in mistake(capsys, "heal", "node-0", *where)
        assert "--net.rate 1: not understood" in mistake(capsys, "show", *where, "--net.rate", "1")
        monkeypatch.setenv("ISTHMUS_OPERATOR", "guess")
        assert "does not have the operator's secret of this run" in mistake(capsys, "show", *where)
        monkeypatch.setenv("ISTHMUS_TOKEN", "guess")
        assert f"the coordinator at {one.address} does not accept this key" in mistake(capsys, "show", *where)
        monkeypatch.delenv("ISTHMUS_OPERATOR")
        assert "the operator's secret is missing" in mistake(capsys, "show", *where)
        assert a.endpoint._engine.profile == HOME


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected the coordinator's address" in mistake(capsys, "show", "--coordinator", str(tmp_path))
    assert "--coordinator" in mistake(capsys, "show", "--coordinator", "tcp://nowhere")
