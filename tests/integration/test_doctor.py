"""`isthmus doctor` between real processes: on 127.0.0.1, and in four network namespaces with one faulty link."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.endpoints import Inbox
from helpers.isthmus_runs import command, environment

from coordinator.config import CoordinatorConfig
from coordinator.keyring import node_access
from coordinator.messages import CONTROL_TAG, COORDINATOR, RUN_ID
from coordinator.survey import serve
from netem.config import convert
from netem.endpoint import Endpoint, unique
from netem.network import UNSHAPED
from netem.profile import ProfileConfig
from netem.retransmissions import segments_to
from netem.verify.kernel import iproute, shape, unavailable
from netem.verify.lan import Lan, lan

TOKEN = "a-long-secret-for-this-test"
RATE_BPS = 50e6
NAMES = ("anna", "ben", "cleo", "dan")
WAIT_S = 90.0


class Doctor:
    """One `isthmus doctor` under way."""

    def __init__(self, log: Path, *words: str, prefix: tuple[str, ...] = (), token: str = TOKEN) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*prefix, *command("doctor", *words)],
                cwd=ROOT,
                env=environment(log.parent, token),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> tuple[int, str]:
        """Its exit code and what it has printed."""
        try:
            return self.process.wait(WAIT_S), self.log.read_text()
        finally:
            self.process.kill()

    def address(self) -> str:
        """Where it listens, once it does."""
        deadline_s = time.monotonic() + WAIT_S
        while not (found := re.search(r"machines at (tcp://\S+)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        return found[1]


@contextmanager
def doctors(folder: Path) -> Iterator[list[Doctor]]:
    """Those that are added are gone afterwards."""
    made: list[Doctor] = []
    try:
        yield made
    finally:
        for one in made:
            one.process.kill()
            one.process.wait(10)


def test_three_machines_get_the_same_result_with_profile_and_plan(tmp_path: Path) -> None:
    config, out = "configs/tiny.toml", tmp_path / "network.toml"
    with doctors(tmp_path) as made:
        words = ("--listen", "tcp://127.0.0.1:0", "--nodes", "3", "--name", "anna", "--out", str(out))
        made.append(Doctor(tmp_path / "anna", config, *words))
        address = made[0].address()
        made += [Doctor(tmp_path / name, config, "--join", address, "--name", name) for name in NAMES[1:3]]
        results = [one.end() for one in made]
    texts = {text[text.index("| machine") :] for _, text in results}
    assert len(texts) == 1, "everyone is told the same"
    (text,) = texts
    assert [code for code, _ in results] == [1 if "What is wrong" in text else 0] * 3
    assert "cannot reach" not in text
    assert len(re.findall(r"^\| \w+ → \w+ +\| +[\d.]+ [MG]bit/s ", text, re.MULTILINE)) == 6
    assert "on 3 nodes" in text
    convert(ProfileConfig, tomllib.loads(out.read_text()), "profile")


@pytest.mark.slow
def test_a_wrong_token_is_refused_at_once_and_the_right_one_still_gets_in(tmp_path: Path) -> None:
    with doctors(tmp_path) as made:
        words = ("--listen", "tcp://127.0.0.1:0", "--nodes", "2", "--name", "anna")
        made.append(Doctor(tmp_path / "anna", *words))
        address = made[0].address()
        began_s = time.monotonic()
        made.append(Doctor(tmp_path / "wrong", "--join", address, "--name", "eve", token="another-secret-of-length"))
        code, text = made[1].end()
        assert code == 2
        assert "does not accept this key" in text
        assert "Traceback" not in text
        assert time.monotonic() - began_s < 40
        made.append(Doctor(tmp_path / "ben", "--join", address, "--name", "ben"))
        assert "eve" not in made[2].end()[1]
        assert made[0].end()[0] in (0, 1)


@pytest.mark.slow
def test_invitations_take_the_place_of_a_token(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    made_keys = subprocess.run(command("keys", keys, "--name", "ben"), cwd=ROOT, capture_output=True, timeout=WAIT_S)
    assert made_keys.returncode == 0
    with doctors(tmp_path) as made:
        own = ("--coordinator.keys", str(keys / "coordinator.toml"))
        words = ("--listen", "tcp://127.0.0.1:0", "--nodes", "2", "--name", "anna", *own)
        made.append(Doctor(tmp_path / "anna", *words, token=""))
        invited = ("--coordinator.keys", str(keys / "ben.toml"))
        made.append(Doctor(tmp_path / "ben", "--join", made[0].address(), *invited, token=""))
        for code, text in (one.end() for one in made):
            assert code in (0, 1), text
            assert "| ben " in text
            assert "cannot reach" not in text


@pytest.mark.slow
def test_where_nobody_listens_it_says_so_within_its_limit(tmp_path: Path) -> None:
    with doctors(tmp_path) as made:
        made.append(Doctor(tmp_path / "ben", "--join", "tcp://127.0.0.1:9"))
        code, text = made[0].end()
    assert code == 2
    assert "nobody answers: nothing listens at 127.0.0.1:9 (connection refused)" in text


def test_a_node_of_a_run_is_told_that_this_is_no_run_and_nonsense_changes_nothing(tmp_path: Path) -> None:
    with doctors(tmp_path) as made, ExitStack() as stack:
        words = ("--listen", "tcp://127.0.0.1:0", "--nodes", "2", "--name", "anna")
        made.append(Doctor(tmp_path / "anna", *words))
        address = made[0].address()
        access, lead = node_access(CoordinatorConfig(token=TOKEN), "tcp://127.0.0.1:0")
        inbox = Inbox()
        name = unique("stranger", access.pair.public)
        stranger = Endpoint(name, RUN_ID, UNSHAPED, inbox, bind=None, access=access)
        stack.callback(stranger.close)
        stranger.connect(COORDINATOR, address, answers_only=True, key=lead)
        for body in (b"\xc1nonsense", b"\x80", bytes(3000)):
            stranger.send(COORDINATOR, CONTROL_TAG, [body], urgent=True)
        assert b"trains nothing" in bytes(inbox.next().buffer)
        stranger.send(COORDINATOR, b"no tag of ours", [bytes(5000)])
        node = subprocess.run(
            command("node", "configs/tiny.toml", "--join", address),
            cwd=ROOT,
            env=environment(tmp_path, TOKEN),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert node.returncode == 2
        assert "this is isthmus doctor, which trains nothing" in node.stderr
        made.append(Doctor(tmp_path / "ben", "--join", address, "--name", "ben"))
        assert "cannot reach" not in made[1].end()[1]


@pytest.fixture
def four() -> Iterator[Lan]:
    """Four hosts with lines of 50 Mbit/s. Skips where this machine lets us make none."""
    if (why := unavailable()) is not None:
        pytest.skip(why)
    with lan(4, RATE_BPS) as made:
        yield made


def slow(made: Lan) -> None:
    """Between ben and dan, packets take a way of their own with 4 Mbit/s."""
    one, two = (made.hosts[place].prefix[3] for place in (1, 3))
    iproute("ip", "-n", one, "link", "add", "slow", "type", "veth", "peer", "name", "slow", "netns", two)
    for host, to in ((1, 3), (3, 1)):
        space, own, other = made.hosts[host].prefix[3], made.hosts[host].address, made.hosts[to].address
        iproute("ip", "-n", space, "link", "set", "slow", "up")
        iproute("ip", "-n", space, "route", "add", f"{other}/32", "dev", "slow", "src", own)
        shape(space, "slow", 4e6)


def blocked(made: Lan) -> None:
    """A firewall on dan's machine drops ben's connections."""
    drop = ("-A", "INPUT", "-s", made.hosts[1].address, "-p", "tcp", "--syn", "-j", "DROP")
    iproute(*made.hosts[3].prefix, "iptables", *drop)


def lossy(made: Lan) -> None:
    """One in twelve of the packets that ben sends to dan is lost."""
    lose = ("-m", "statistic", "--mode", "random", "--probability", "0.08", "-j", "DROP")
    iproute(*made.hosts[3].prefix, "iptables", "-A", "INPUT", "-s", made.hosts[1].address, "-p", "tcp", *lose)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (slow, [r"ben → dan carries [34]\.\d* Mbit/s", r"dan → ben carries [34]\.\d* Mbit/s"]),
        (blocked, [r"ben cannot reach dan: \S+ does not answer within 5 s: a firewall"]),
        (lossy, [r"ben → dan loses packets: TCP sent \d+ of \d+ again"]),
    ],
)
def test_the_faulty_link_of_four_machines_is_found(four: Lan, tmp_path: Path, fault: object, said: list[str]) -> None:
    assert callable(fault)
    fault(four)
    with doctors(tmp_path) as made:
        host = four.hosts[0]
        words = ("--listen", f"tcp://{host.address}:7070", "--nodes", "4", "--name", NAMES[0])
        made.append(Doctor(tmp_path / NAMES[0], *words, prefix=host.prefix))
        address = made[0].address()
        for name, place in zip(NAMES[1:], four.hosts[1:], strict=True):
            made.append(Doctor(tmp_path / name, "--join", address, "--name", name, prefix=place.prefix))
        results = [one.end() for one in made]
    assert {code for code, _ in results} == {1}, results[0][1]
    text = results[0][1]
    found = re.findall(r"^\d+\. (.*)", text, re.MULTILINE)
    for pattern in said:
        assert any(re.match(pattern, line) for line in found), text
    assert all("ben" in line and "dan" in line for line in found), text


def test_why_no_connection_can_be_opened_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert serve.trouble_with(f"tcp://127.0.0.1:{port}") == f"another program listens at 127.0.0.1:{port}"
    assert "nothing listens at" in serve.trouble_with(f"tcp://127.0.0.1:{port}")
    assert "has no address here" in serve.trouble_with("tcp://no-such-host.invalid:7070")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_segments_of_a_connection_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert segments_to("127.0.0.1", port) is None
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as other:
            for _ in range(10):
                client.sendall(b"x" * 100)
                other.recv(100)
            found = segments_to("127.0.0.1", port)
            assert found is not None
            assert found.sent == 10
            assert found.repeated == 0
    assert segments_to("no-such-host.invalid", 1) is None
