"""Strangers at a coordinator's and a node's door, over real sockets: the run goes on, and memory stays bounded."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from helpers.coordinators import node, settings, swarm
from helpers.endpoints import Inbox, eventually

from coordinator.keyring import make_keys
from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    PROTOCOL_VERSION,
    RUN_ID,
    Ask,
    Join,
    Leave,
    Refused,
    decode_from_coordinator,
    encode,
)
from netem import frames
from netem.door import DoorLimits
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, NotAdmitted
from netem.keys import Access, KeyPair, derived_pair, new_pair, pair_of
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile

MB = 10**6
LTE = Profile(name="lte", scope="nic", rate_bps=20e6, latency_s=0.02)
MOST_EXTRA_MB = 64


def lead_key(token: str = "secret") -> str:
    return derived_pair(token, COORDINATOR).public


@contextmanager
def caller(name: str, address: str, pair: KeyPair, key: str) -> Iterator[tuple[Endpoint, Inbox]]:
    """An endpoint that calls a coordinator by this name, whoever the name belongs to."""
    inbox = Inbox()
    one = Endpoint(name, RUN_ID, UNSHAPED, inbox, bind=None, limits=Limits(max_strangers=0), access=Access(pair))
    try:
        one.connect(COORDINATOR, address, answers_only=True, key=key)
        yield one, inbox
    finally:
        one.close()


def control(body: bytes, number: int = 0, total_bytes: int | None = None) -> list[bytes]:
    """A control message in one frame, as an endpoint writes it."""
    header = frames.Header(
        *(frames.VERSION, RUN_ID, frames.Kind.DATA, 0, 1, 0, number, 0),
        message=number,
        total_bytes=len(body) if total_bytes is None else total_bytes,
        checksum=zlib.crc32(body),
        tag=CONTROL_TAG,
    )
    return [frames.stamped(frames.encode(header), 0.0), body]


@contextmanager
def raw(count: int, address: str, key: str = "") -> Iterator[list[zmq.Socket[bytes]]]:
    """DEALERs, with a key of their own and that of the callee, or without any."""
    context = zmq.Context()
    context.max_sockets = 4096
    dealers = []
    try:
        for _ in range(count):
            dealer = context.socket(zmq.DEALER)
            dealers.append(dealer)
            dealer.linger = 0
            pair = new_pair()
            if key:
                dealer.curve_serverkey = key.encode()
                dealer.curve_publickey, dealer.curve_secretkey = pair.public.encode(), pair.secret.encode()
                dealer.setsockopt(95, f"X-Peer:{unique('node', pair.public)}".encode())
            dealer.connect(address)
        yield dealers
    finally:
        context.destroy(linger=0)


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / MB


def test_without_keys_or_with_a_wrong_one_nobody_is_heard_and_the_run_goes_on(tmp_path: Path) -> None:
    config = settings(nodes=1)
    with swarm(config, 40, tmp_path) as one:
        run = one.train("node-0", config, pause_s=0.05)
        leave = control(encode(Leave()))
        with raw(100, one.address) as keyless, raw(100, one.address, lead_key("guess")) as wrong:
            for dealer in (*keyless, *wrong):
                with suppress(zmq.Again):  # it has been turned away already
                    dealer.send_multipart(leave, zmq.NOBLOCK)
            assert len(run.result(60)) == 40
            door = one.server._endpoint.door()
        assert door is not None
        assert door.keyless + door.crowded + door.hasty >= 100
        assert 100 <= sum(record.refused.get("refused_connections", 0) for record in one.records) <= door.refused
        assert len(list(one.server._endpoint._engine.peers)) <= 1
        assert one.outcome.result(20).ok


def test_a_member_s_name_opens_nothing_without_its_key(tmp_path: Path) -> None:
    """Not even to one who has the token: neither is the name heard, nor is the member's connection taken over."""
    config = settings(nodes=1)
    with swarm(config, 40, tmp_path) as one, node(one.address, "node-0", config) as (session, member):
        session.join()
        with caller(member.name, one.address, new_pair(), lead_key()) as (thief, told):
            for step in range(10):
                thief.send(COORDINATOR, CONTROL_TAG, [encode(Leave())], urgent=True)
                go = session.ready(step, {}, {})
                session.vote(go.rounds[0].round_id, True, "digest")  # type: ignore[union-attr]
                time.sleep(0.05)
            assert told.deliveries.empty()
        door = one.server._endpoint.door()
        assert door is not None
        assert door.misnamed >= 1
        assert not one.outcome.done()


def test_a_join_that_is_played_back_brings_nobody_in(tmp_path: Path) -> None:
    """Who has the token may read the roster; what a member said there is of no use under another key."""
    config = settings(nodes=2)
    with swarm(config, 5, tmp_path) as one, node(one.address, "node-0", config) as (session, member):
        session._say(session._join)
        eventually(lambda: len(one.server._run.membership))
        pair = new_pair()
        with caller(unique("node-0", pair.public), one.address, pair, lead_key()) as (stranger, told):
            stranger.send(COORDINATOR, CONTROL_TAG, [encode(session._join)], urgent=True)
            answer = decode_from_coordinator(told.next().buffer)
            assert isinstance(answer, Refused)
            assert "did not come with the key that it names" in answer.reason
        assert one.server._run.membership.peers == [member.name]


@pytest.mark.parametrize("profile", [UNSHAPED, LTE], ids=["unshaped", "lte"])
def test_half_open_connections_leave_room_and_memory(tmp_path: Path, profile: Profile) -> None:
    config = settings(nodes=1)
    with swarm(config, 40, tmp_path, profile) as one:
        host, _, port = one.address.removeprefix("tcp://").rpartition(":")
        before_mb = rss_mb()
        idle = [socket.create_connection((host, int(port))) for _ in range(500)]
        try:
            for connection in idle[::2]:
                connection.send(b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE" + bytes(43))  # a greeting, and no more
            assert len(one.train("node-0", config, pause_s=0.02).result(60)) == 40
            assert len(one.server._endpoint._sockets._porter.door) < 128  # type: ignore[union-attr]
            assert rss_mb() - before_mb < MOST_EXTRA_MB
        finally:
            for connection in idle:
                connection.close()


@pytest.mark.parametrize("profile", [UNSHAPED, LTE], ids=["unshaped", "lte"])
@pytest.mark.parametrize("keyed", [False, True], ids=["without keys", "with the token"])
def test_a_flood_of_large_frames_leaves_the_run_alone(tmp_path: Path, profile: Profile, keyed: bool) -> None:
    """260 strangers who send frames of 1 MB and go on: members' heartbeats do not wait behind them."""
    config = settings(nodes=1)
    flood = control(bytes(60_000) if keyed else bytes(MB), total_bytes=MB)
    with swarm(config, 60, tmp_path, profile) as one:
        run = one.train("node-0", config, pause_s=0.05)
        eventually(lambda: one.checkpoints)
        with raw(260, one.address, lead_key() if keyed else "") as dealers:
            for dealer in dealers:
                dealer.sndhwm = 4
            before_mb = most_mb = rss_mb()
            while not run.done():
                for dealer in dealers:
                    try:
                        dealer.send_multipart(flood, zmq.NOBLOCK, copy=False)
                    except zmq.Again:
                        continue
                most_mb = max(most_mb, rss_mb())
                time.sleep(0.01)
            assert len(run.result(60)) == 60
        # The strangers' own queues, in this very process, hold references to one buffer.
        assert most_mb - before_mb < 2 * MOST_EXTRA_MB
        assert one.outcome.result(20).ok


def test_the_operators_secret_is_asked_for(tmp_path: Path) -> None:
    """The token alone does not change the network, nor does it show it."""
    config = settings(nodes=1)
    with swarm(config, 5, tmp_path) as one:
        pair = new_pair()
        with caller(unique("(operator)", pair.public), one.address, pair, lead_key()) as (guest, told):
            guest.send(COORDINATOR, CONTROL_TAG, [encode(Ask(version=PROTOCOL_VERSION))], urgent=True)
            answer = decode_from_coordinator(told.next().buffer)
            assert isinstance(answer, Refused)
            assert "does not have the operator's secret" in answer.reason
        one.train("node-0", config).result(30)
        assert sum(record.refused.get("refused_requests", 0) for record in one.records) == 1


def test_invitations_let_in_who_has_one_under_its_name_alone(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["node-0", "node-1"])
    make_keys(tmp_path / "others", ["node-0"])

    def invited(file: str):  # type: ignore[no-untyped-def]
        return settings(nodes=2, token="", operator="", keys=str(tmp_path / file))

    with swarm(invited("keys/coordinator.toml"), 3, tmp_path / "run") as one:
        with pytest.raises(ConfigError, match="it does not accept this node's key"):
            one.train("node-0", invited("others/node-0.toml")).result(30)
        with pytest.raises(ConfigError, match="this invitation is not for the name node-7"):
            one.train("node-7", invited("keys/node-0.toml")).result(30)
        runs = [one.train(f"node-{rank}", invited(f"keys/node-{rank}.toml")) for rank in range(2)]
        assert [len(run.result(60)) for run in runs] == [3, 3]


class Doors:
    """Two nodes that know each other, and what they share."""

    def __init__(self, encrypts: bool) -> None:
        self.shared = "a secret that members share"
        self.encrypts = encrypts
        self.pairs = [new_pair(), new_pair()]
        self.inboxes = [Inbox(), Inbox()]
        self.ends = [
            Endpoint(
                unique(f"node-{rank}", pair.public),
                "run",
                UNSHAPED,
                inbox,
                bind="tcp://127.0.0.1:0",
                limits=Limits(max_strangers=0),
                access=Access(pair, encrypts),
                door=DoorLimits(handshake_s=1.0),
            )
            for rank, (pair, inbox) in enumerate(zip(self.pairs, self.inboxes, strict=True))
        ]

    def meet(self, rank: int, other: int) -> None:
        self.ends[rank].share(self.shared)
        self.ends[rank].connect(
            self.ends[other].name, self.ends[other].address, key=self.pairs[other].public, encrypted=self.encrypts
        )

    def close(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture(params=[True, False], ids=["curve", "proof"])
def doors(request: pytest.FixtureRequest) -> Iterator[Doors]:
    made = Doors(request.param)
    yield made
    made.close()


def test_a_member_that_dials_before_the_roster_has_come_here_is_let_in_when_it_comes(doors: Doors) -> None:
    doors.meet(0, 1)
    doors.ends[0].send(doors.ends[1].name, b"early", [bytes(MB)])
    time.sleep(0.3)
    assert doors.inboxes[1].deliveries.empty()
    doors.meet(1, 0)
    assert doors.inboxes[1].next().tag == b"early"
    doors.ends[1].send(doors.ends[0].name, b"back")
    assert doors.inboxes[0].next().tag == b"back"
    assert doors.ends[0].counters()[doors.ends[1].name].resent_bytes == 0


def test_at_a_node_a_members_name_opens_nothing(doors: Doors) -> None:
    """With another key, or without the secret that the members share."""
    doors.meet(0, 1)
    doors.meet(1, 0)
    member, node_ = doors.ends
    inbox = Inbox()
    thief = Endpoint(member.name, "run", UNSHAPED, inbox, bind=None, access=Access(new_pair()))
    try:
        thief.share("a guess")
        thief.connect(node_.name, node_.address, key=doors.pairs[1].public, encrypted=doors.encrypts)
        thief.send(node_.name, b"evil")
        time.sleep(0.5)
        for number in range(20):
            member.send(node_.name, b"%d" % number, [bytes(1000)])
        assert [doors.inboxes[1].next().tag for _ in range(20)] == [b"%d" % number for number in range(20)]
        node_.send(member.name, b"answer")
        assert doors.inboxes[0].next().tag == b"answer"
        assert inbox.deliveries.empty()
    finally:
        thief.close()


def test_a_peer_that_was_forgotten_is_not_let_in_again(doors: Doors) -> None:
    doors.meet(0, 1)
    doors.meet(1, 0)
    member, node_ = doors.ends
    member.send(node_.name, b"hello")
    assert doors.inboxes[1].next().tag == b"hello"
    node_.forget(member.name)
    member.forget(node_.name)
    time.sleep(0.2)
    doors.meet(0, 1)
    member.send(node_.name, b"again")
    time.sleep(0.5)
    assert doors.inboxes[1].deliveries.empty()


def test_a_wrong_token_is_told_in_time(tmp_path: Path) -> None:
    with swarm(settings(nodes=1), 5, tmp_path) as one:
        pair = new_pair()
        began = time.monotonic()
        with caller(unique("node-0", pair.public), one.address, pair, lead_key("guess")) as (_, told):
            error = told.next_error()
        assert isinstance(error, NotAdmitted)
        assert error.peer == COORDINATOR
        assert time.monotonic() - began < 10


def test_the_secret_leaves_only_with_the_roster(tmp_path: Path) -> None:
    config = settings(nodes=1)
    with swarm(config, 2, tmp_path) as one, node(one.address, "node-0", config) as (session, _):
        _, roster = session.join()
        assert len(roster.secret) == 32
        kept = one.server._run._generations.roster
        assert kept is not None
        assert kept.secret == ""
        assert msgspec.structs.replace(roster, secret="") == kept
        assert isinstance(session._join, Join)
        assert pair_of(new_pair().secret).public not in repr(new_pair())


def test_a_proxy_with_nobody_behind_it_is_no_refusal_and_neither_is_a_coordinator_that_is_away(tmp_path: Path) -> None:
    """As in a container whose coordinator is being started again: the node goes on calling."""
    pair, lead = new_pair(), derived_pair("secret", COORDINATOR)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"tcp://127.0.0.1:{proxy.getsockname()[1]}"
        with caller(unique("node-0", pair.public), address, pair, lead.public) as (one, told):
            one.send(COORDINATOR, CONTROL_TAG, [b"hello"], urgent=True)
            closes_s = time.monotonic() + 4
            proxy.settimeout(0.1)
            while time.monotonic() < closes_s:
                with suppress(TimeoutError):
                    proxy.accept()[0].close()
            assert told.errors.empty()
            proxy.close()
            inbox = Inbox()
            boss = Endpoint(COORDINATOR, RUN_ID, UNSHAPED, inbox, bind=address, access=Access(lead, invited=None))
            try:
                assert inbox.next().tag == CONTROL_TAG
            finally:
                boss.close()
            with swarm_of_strangers(address):
                time.sleep(4)
            assert told.errors.empty()


@contextmanager
def swarm_of_strangers(address: str) -> Iterator[None]:
    """Another coordinator, with another key, at this address."""
    other = Endpoint(COORDINATOR, RUN_ID, UNSHAPED, Inbox(), bind=address, access=Access(new_pair(), invited=None))
    try:
        yield
    finally:
        other.close()
