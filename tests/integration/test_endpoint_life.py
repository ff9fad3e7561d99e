"""The life of an endpoint over real sockets: names, strangers, addresses, limits, and that everything ends."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time

import pytest
import zmq
from helpers.endpoints import LOCAL, Inbox, endpoint, eventually, network

from netem import frames
from netem.endpoint import STRANGERS, Endpoint, unique
from netem.errors import ConfigError, IsthmusError
from netem.host import measure
from netem.keys import Access, new_pair
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile

pytestmark = pytest.mark.alone

MB = 10**6
FD_SETSIZE = 1024


def test_two_of_one_name_are_two() -> None:
    with endpoint("boss") as (boss, heard):
        first, second = unique("node"), unique("node")
        with endpoint(first, bind=None) as (one, answers), endpoint(second, bind=None) as (two, others):
            for node in (one, two):
                node.connect("boss", boss.address)
                node.send("boss", node.name.encode())
            assert {heard.next().peer for _ in range(2)} == {first, second}
            boss.send(first, b"for one")
            boss.send(second, b"for two")
            assert (answers.next().tag, others.next().tag) == (b"for one", b"for two")


def test_who_is_dialled_for_answers_only_is_not_heard_when_it_calls() -> None:
    with endpoint("boss") as (boss, heard), endpoint("node", limits=Limits(max_strangers=0)) as (node, answers):
        node.connect("boss", boss.address, answers_only=True)
        with endpoint("boss", bind=None) as (impostor, _):
            impostor.connect("node", node.address)
            impostor.send("node", b"the run is over", urgent=True)
            eventually(lambda: STRANGERS in node.counters() and node.counters()[STRANGERS].dropped)
            node.send("boss", b"join")
            assert heard.next().tag == b"join"
            boss.send("node", b"welcome")
            assert answers.next().tag == b"welcome"
            assert answers.deliveries.empty()
            assert answers.errors.empty()


def test_strangers_are_not_heard_where_they_are_not_wanted() -> None:
    with endpoint("node", limits=Limits(max_strangers=0)) as (node, inbox):
        with endpoint("stranger", bind=None) as (stranger, _):
            stranger.connect("node", node.address)
            stranger.send("node", b"nonsense", [bytes(MB)])
            eventually(lambda: STRANGERS in node.counters() and node.counters()[STRANGERS].dropped)
            assert not list(node._engine.peers)
        with endpoint("friend") as (friend, _):
            node.connect("friend", friend.address)
            friend.connect("node", node.address)
            friend.send("node", b"hello")
            assert inbox.next().peer == "friend"
        assert inbox.errors.empty()


def test_strangers_displace_each_other_and_nobody_else() -> None:
    begun = frames.Header(frames.VERSION, "run", frames.Kind.DATA, 0, 1, 0, 0, 0, total_bytes=100)
    context = zmq.Context()
    strangers = []
    try:
        with endpoint("b", limits=Limits(max_strangers=3)) as (b, inbox), endpoint("a", bind=None) as (a, answers):
            a.connect("b", b.address)
            a.send("b", b"hello")
            assert inbox.next().peer == "a"
            b.trust("a")
            for number in range(10):
                stranger = context.socket(zmq.DEALER)
                strangers.append(stranger)
                stranger.routing_id = b"stranger-%d" % number
                stranger.connect(b.address)
                stranger.send_multipart([frames.stamped(frames.encode(begun), 0.0), b"x"])
                eventually(lambda name=f"stranger-{number}": name in b.counters())
            eventually(lambda: len(b.counters()) == 5)
            assert {"a", STRANGERS, "stranger-9"} <= set(b.counters())
            b.send("a", b"still here")
            assert answers.next().tag == b"still here"
            assert a.flush(5.0)
    finally:
        context.destroy(linger=0)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ipv6() -> None:
    with endpoint("b", bind="tcp://[::1]:0") as (b, inbox), endpoint("a", bind=None) as (a, _):
        assert b.address.startswith("tcp://[::1]:")
        a.connect("b", b.address)
        a.send("b", b"hello")
        assert inbox.next().tag == b"hello"


def test_a_message_above_the_cap_is_refused_by_its_sender() -> None:
    with network("a", "b", limits=Limits(max_message_bytes=MB, max_tag_bytes=100)) as (endpoints, _):
        for tag, nbytes in ((b"", MB + 1), (bytes(101), 0)):
            with pytest.raises(IsthmusError, match="a message to b"):
                endpoints["a"].send("b", tag, [bytes(nbytes)])


def test_flush_and_close_are_bounded_with_nobody_there() -> None:
    opened = Endpoint("a", "run", UNSHAPED, Inbox(), bind=LOCAL)
    opened.connect("b", "tcp://127.0.0.1:9")
    opened.send("b", b"x", [bytes(50 * MB)])
    start = time.monotonic()
    assert not opened.flush(0.2)
    assert time.monotonic() - start < 0.5
    start = time.monotonic()
    opened.close()
    opened.close()
    assert time.monotonic() - start < 2.0
    with pytest.raises(IsthmusError, match="a: the endpoint is closed"):
        opened.send("b", b"x")


def test_closing_says_the_acknowledgements_that_are_owed() -> None:
    with network("a", "b", profile=Profile(rate_bps=100e6, latency_s=0.1)) as (endpoints, inboxes):
        endpoints["a"].send("b", b"last")
        inboxes["b"].next()
        endpoints["b"].close()
        assert endpoints["a"].flush(1.0)


def test_an_idle_endpoint_uses_no_cpu_to_speak_of() -> None:
    with network("a", "b", profile=Profile(rate_bps=300e6, latency_s=0.01)) as (endpoints, inboxes):
        for _ in range(20):
            endpoints["a"].send("b", b"x", [bytes(100_000)])
        for _ in range(20):
            inboxes["b"].next()
        assert endpoints["a"].flush(5.0)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_upper_floor_is_told_and_not_swallowed() -> None:
    with network("a", "b") as (endpoints, inboxes):

        def broken(*_: object) -> None:
            raise RuntimeError("a fault of ours")

        inboxes["b"].deliver = broken  # type: ignore[method-assign]
        endpoints["a"].send("b", b"x")
        assert "b: the I/O thread failed: RuntimeError('a fault of ours')" in str(inboxes["b"].next_error())
        assert not endpoints["a"].flush(0.1)
        eventually(lambda: not any(thread.name == "netem b" for thread in threading.enumerate()))
        with pytest.raises(IsthmusError, match="closed"):
            endpoints["b"].send("a", b"x")


@pytest.mark.parametrize("access", [None, Access(new_pair()), Access(new_pair(), encrypts=False)])
def test_a_port_in_use_is_one_clear_line(access: Access | None) -> None:
    with endpoint("a") as (a, _), pytest.raises(ConfigError) as raised:
        Endpoint("b", "run", UNSHAPED, Inbox(), bind=a.address, access=access)
    assert str(raised.value).startswith(f"bind = '{a.address}': the port is in use; ")


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("tcp://*:5555", "name one interface"),
        ("tcp://0.0.0.0:5555", "name one interface"),
        ("localhost:5555", "expected tcp://HOST:PORT"),
        ("tcp://127.0.0.1:70000", "expected tcp://HOST:PORT"),
        ("tcp://192.0.2.1:0", "no such interface"),
        ("tcp://nosuch0:0", "no such interface"),
    ],
)
def test_what_cannot_be_bound_is_one_clear_line(bind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Endpoint("b", "run", UNSHAPED, Inbox(), bind=bind)


def test_addresses_and_names_are_checked_where_they_are_given() -> None:
    with endpoint("a") as (a, _):
        with pytest.raises(ConfigError, match="address of b = 'b:1'"):
            a.connect("b", "b:1")
        for address in ("tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://*:5555", "tcp://0.0.0.0:5555"):
            with pytest.raises(ConfigError, match=r"address of b = .* expected one host and one port"):
                a.connect("b~1", address)
        with pytest.raises(ConfigError, match="expected an IPv6 address in the brackets"):
            a.connect("b", "tcp://[1::2::3]:5")
        with pytest.raises(ConfigError, match="peer = ''"):
            a.connect("", "tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="name = "):
        Endpoint("a\n", "run", UNSHAPED, Inbox(), bind=None)


def test_the_host_is_measured_in_a_moment() -> None:
    start = time.monotonic()
    assert measure(Profile(rate_bps=300e6)) > 200e6
    assert time.monotonic() - start < 3.0


def test_an_endpoint_works_in_a_process_with_more_open_files_than_select_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FD_SETSIZE + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files here, and the test wants {wanted}")
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        while not held or held[-1] < FD_SETSIZE:
            held.append(os.open(os.devnull, os.O_RDONLY))
        with network("a", "b") as (endpoints, inboxes):
            for number in range(20):
                endpoints["a"].send("b", bytes([number]), [bytes(100_000)])
                assert inboxes["b"].next().buffer.nbytes == 100_000
            assert endpoints["a"].flush(5.0)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
