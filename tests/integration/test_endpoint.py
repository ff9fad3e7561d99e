"""The endpoint over real sockets: what arrives, what is dropped and counted, who is reported, and that it all ends."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest
import zmq
from helpers import ROOT
from helpers.endpoints import LOCAL, Inbox, network

from netem import frames
from netem.endpoint import STRANGERS, Endpoint, unique
from netem.errors import ConfigError, IsthmusError, PeerSilent, ProtocolError, QueueFull
from netem.host import measure
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile

MB = 10**6
FD_SETSIZE = 1024
IMPATIENT = Limits(silent_s=0.6, resend_s=0.2)


@contextmanager
def endpoint(
    name: str, *, bind: str | None = LOCAL, run_id: str = "run", **kwargs: object
) -> Iterator[tuple[Endpoint, Inbox]]:
    inbox = Inbox()
    opened = Endpoint(name, run_id, UNSHAPED, inbox, bind=bind, **kwargs)  # type: ignore[arg-type]
    try:
        yield opened, inbox
    finally:
        opened.close()


@contextmanager
def child_of(address: str) -> Iterator[subprocess.Popen[bytes]]:
    script = ROOT / "tests" / "helpers" / "netem_peer.py"
    process = subprocess.Popen([sys.executable, str(script), address], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate(timeout=10)


def eventually(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_messages_arrive_whole_and_in_order_with_any_buffers() -> None:
    array = np.arange(300_000, dtype=np.float32).reshape(3, 100_000)
    with network("a", "b") as (endpoints, inboxes):
        for number in range(20):
            endpoints["a"].send("b", bytes([number]), [array, b"", b"tail", np.zeros((0, 4)), memoryview(b"")])
        endpoints["a"].send("b", b"none")
        for number in range(20):
            delivery = inboxes["b"].next()
            assert (delivery.peer, delivery.tag) == ("a", bytes([number]))
            assert bytes(delivery.buffer) == array.tobytes() + b"tail"
        assert inboxes["b"].next().buffer.nbytes == 0
        assert endpoints["a"].flush(5.0)
        sent, received = endpoints["a"].counters()["b"], endpoints["b"].counters()["a"]
    assert sent.payload_bytes == received.received_payload_bytes == 20 * (array.nbytes + 4)
    assert sent.wire_bytes > sent.payload_bytes
    assert sent.messages == received.received_messages == 22  # with the greeting
    assert (sent.resent_bytes, received.dropped, received.duplicates) == (0, 0, 0)


def test_both_directions_at_once_and_from_several_threads() -> None:
    with network("a", "b", profile=Profile(rate_bps=500e6, latency_s=0.002)) as (endpoints, inboxes):

        def talk(source: str, target: str, flow: int) -> None:
            for number in range(50):
                endpoints[source].send(target, bytes([flow, number]), [bytes(20_000)], flow=flow)

        threads = [
            threading.Thread(target=talk, args=(*pair, flow)) for pair in (("a", "b"), ("b", "a")) for flow in range(3)
        ]
        for thread in threads:
            thread.start()
        for name in "ab":
            tags = [inboxes[name].next().tag for _ in range(150)]
            for flow in range(3):
                assert [tag[1] for tag in tags if tag[0] == flow] == list(range(50))
        for thread in threads:
            thread.join(10.0)


def test_a_peer_without_an_address_is_answered_over_its_own_connection() -> None:
    with endpoint("coordinator") as (coordinator, heard), endpoint("node", bind=None) as (node, answers):
        assert node.address == ""
        node.connect("coordinator", coordinator.address)
        node.send("coordinator", b"join")
        assert heard.next().peer == "node"
        coordinator.send("node", b"welcome", [bytes(3 * MB)], urgent=True)
        assert (answers.next().tag, coordinator.flush(5.0)) == (b"welcome", True)


def test_a_message_may_be_sent_before_its_receiver_is_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with endpoint("early", bind=None) as (early, _):
        early.connect("late", address)
        early.send("late", b"first", [bytes(MB)])
        time.sleep(0.1)
        with endpoint("late", bind=address) as (_, inbox):
            assert inbox.next().tag == b"first"
            assert early.flush(5.0)


def test_a_peer_that_returns_is_sent_what_it_missed() -> None:
    with endpoint("a", bind=None, limits=Limits(resend_s=0.2)) as (a, _):
        with endpoint("b") as (first, inbox):
            address = first.address
            a.connect("b", address)
            a.send("b", b"1")
            assert inbox.next().tag == b"1"
            assert a.flush(5.0)
        a.send("b", b"2", [bytes(3 * MB)])
        time.sleep(0.1)
        with endpoint("b", bind=address) as (_, inbox):
            assert inbox.next().tag == b"2"
            a.send("b", b"3")
            assert inbox.next().tag == b"3"
            assert a.flush(5.0)


def test_an_older_generation_is_dropped_and_counted() -> None:
    with network("a", "b") as (endpoints, inboxes):
        endpoints["b"].set_generation(2)
        endpoints["a"].set_generation(1)
        endpoints["a"].send("b", b"stale", [bytes(2 * MB)])
        endpoints["a"].set_generation(2)
        endpoints["a"].send("b", b"fresh")
        delivery = inboxes["b"].next()
        assert (delivery.generation, delivery.tag) == (2, b"fresh")
        assert endpoints["a"].flush(5.0)
        endpoints["a"].set_generation(1)
        endpoints["a"].send("b", b"word", urgent=True)
        eventually(lambda: endpoints["b"].counters()["a"].dropped >= 1)
        assert endpoints["a"].flush(5.0)


def test_bulk_of_an_older_generation_does_not_hold_up_the_next() -> None:
    with network("a", "b", profile=Profile(rate_bps=10e6)) as (endpoints, inboxes):
        endpoints["a"].set_generation(1)
        endpoints["a"].send("b", b"stale", [bytes(10 * MB)])  # 8 s
        time.sleep(0.1)
        start = time.monotonic()
        for name in "ab":
            endpoints[name].set_generation(2)
        endpoints["a"].send("b", b"fresh")
        assert inboxes["b"].next().tag == b"fresh"
        assert time.monotonic() - start < 1.0
        assert endpoints["a"].flush(5.0)


def test_what_is_not_admitted_is_counted_and_nonsense_reported() -> None:
    with network("a", "b") as (endpoints, inboxes):
        inboxes["b"].refuse = b"unwanted"
        endpoints["a"].send("b", b"unwanted", [bytes(3 * MB)])
        endpoints["a"].send("b", b"nonsense", [bytes(3 * MB)])
        endpoints["a"].send("b", b"fine")
        assert inboxes["b"].next().tag == b"fine"
        error = inboxes["b"].next_error()
        assert isinstance(error, ProtocolError)
        assert (error.peer, "means nothing" in str(error)) == ("a", True)
        assert endpoints["b"].counters()["a"].dropped == 2
        assert endpoints["a"].flush(5.0)


def test_garbage_on_the_port_is_counted_and_does_no_harm() -> None:
    with network("a", "b") as (endpoints, inboxes):
        address = endpoints["b"].address
        host, port = address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(os.urandom(4096))
        context = zmq.Context()
        with context.socket(zmq.DEALER) as stranger, context.socket(zmq.DEALER) as impostor:
            stranger.linger = impostor.linger = 0
            stranger.connect(address)
            for parts in ([b""], [b"x", b"y"], [b"x"] * 50, [os.urandom(200), os.urandom(70_000)]):
                stranger.send_multipart(parts)
            stranger.send_multipart([b"", bytes(5 * MB)])  # above the cap: libzmq hangs up
            eventually(lambda: endpoints["b"].counters().get(STRANGERS, None) is not None)
            eventually(lambda: endpoints["b"].counters()[STRANGERS].dropped >= 4)
            assert inboxes["b"].errors.empty()  # nobody's business
            impostor.routing_id = b"a"
            impostor.connect(address)
            impostor.send_multipart([b"\xc1", b""])
            error = inboxes["b"].next_error()
            assert isinstance(error, ProtocolError)
            assert str(error).startswith("a: ")
        context.term()
        endpoints["b"].send("a", b"still here")
        assert inboxes["a"].next().tag == b"still here"


def test_another_run_is_not_heard() -> None:
    with endpoint("b") as (b, inbox), endpoint("a", bind=None, run_id="other") as (a, _):
        a.connect("b", b.address)
        a.send("b", b"x")
        eventually(lambda: STRANGERS in b.counters())
        assert not a.flush(0.1)
        assert inbox.deliveries.empty()
        assert "a" not in b.counters()


def test_a_reader_that_stops_keeps_memory_bounded_and_goes_on_later() -> None:
    window_bytes = 4 * MB
    profile = Profile(window_bytes=window_bytes)
    inbox = Inbox()
    parent = Endpoint("parent", "run", profile, inbox, bind=LOCAL)
    try:
        with child_of(parent.address) as child:
            assert inbox.next().peer == "child"
            child.send_signal(signal.SIGSTOP)
            payload = bytes(100 * MB)
            resident = psutil.Process().memory_info().rss
            parent.send("child", b"much", [payload])
            time.sleep(1.0)
            assert parent.counters()["child"].payload_bytes <= window_bytes
            assert psutil.Process().memory_info().rss - resident < 4 * window_bytes
            assert not parent.flush(0.1)
            child.send_signal(signal.SIGCONT)
            assert parent.flush(20.0)
            assert parent.counters()["child"].payload_bytes == 100 * MB
    finally:
        parent.close()


def test_a_peer_that_dies_is_reported_within_its_deadline() -> None:
    inbox = Inbox()
    parent = Endpoint("parent", "run", UNSHAPED, inbox, bind=LOCAL, limits=IMPATIENT)
    try:
        with child_of(parent.address) as child:
            inbox.next()
            assert parent.flush(5.0)
            child.kill()
            child.wait(10.0)
            start = time.monotonic()
            parent.send("child", b"anyone?", [bytes(MB)])
            error = inbox.next_error(5.0)
            assert isinstance(error, PeerSilent)
            assert (error.peer, "child has not answered for 0.6 s" in str(error)) == ("child", True)
            assert 0.5 < time.monotonic() - start < 1.5
            assert not parent.flush(0.0)
            parent.forget("child")
            assert parent.flush(1.0)  # nothing is waited for any more
            assert inbox.errors.empty()
    finally:
        parent.close()


def test_a_forgotten_peer_may_come_back() -> None:
    with network("a", "b", limits=IMPATIENT) as (endpoints, inboxes):
        endpoints["a"].forget("b")
        endpoints["b"].send("a", b"hello again")
        assert inboxes["a"].next().tag == b"hello again"
        endpoints["a"].connect("b", endpoints["b"].address)
        endpoints["a"].send("b", b"welcome back", [bytes(2 * MB)])
        assert inboxes["b"].next().tag == b"welcome back"
        assert endpoints["a"].flush(5.0)
        assert endpoints["b"].flush(5.0)


def test_the_queue_is_bounded() -> None:
    with network("a", "b", profile=Profile(rate_bps=1e6), limits=Limits(max_queued_bytes=MB)) as (endpoints, _):
        endpoints["a"].send("b", b"", [bytes(MB - 10)])
        with pytest.raises(QueueFull, match=r"a: \d+ bytes wait to be sent, at most 1000000 may"):
            endpoints["a"].send("b", b"", [bytes(100)])
        start = time.monotonic()
        with pytest.raises(QueueFull):
            endpoints["a"].send("b", b"", [bytes(100)], timeout_s=0.2)
        assert 0.2 <= time.monotonic() - start < 1.0
        endpoints["a"].send("b", b"", [bytes(100)], urgent=True)  # control is never held up


def test_one_message_may_exceed_the_queue_but_not_beside_another() -> None:
    with network("a", "b", limits=Limits(max_queued_bytes=MB)) as (endpoints, inboxes):
        for tag in (b"1", b"2"):
            endpoints["a"].send("b", tag, [bytes(3 * MB)], timeout_s=10.0)
            assert endpoints["a"]._queued_bytes <= 3 * MB
        assert [inboxes["b"].next().tag for _ in range(2)] == [b"1", b"2"]


def test_a_sender_is_held_back_and_two_that_wait_for_room_do_not_wait_for_each_other() -> None:
    """Nobody reads: the I/O threads alone make room."""
    limits = Limits(max_queued_bytes=MB)
    with network("a", "b", profile=Profile(rate_bps=200e6, latency_s=0.002), limits=limits) as (endpoints, inboxes):
        most = dict.fromkeys("ab", 0)

        def talk(source: str, target: str) -> None:
            for number in range(100):
                endpoints[source].send(target, bytes([number]), [bytes(100_000)], timeout_s=10.0)
                most[source] = max(most[source], endpoints[source]._queued_bytes)

        threads = [threading.Thread(target=talk, args=pair) for pair in (("a", "b"), ("b", "a"))]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()
        assert time.monotonic() - start > 0.3  # 9 of 10 MB have left, at 25 MB/s
        assert max(most.values()) <= MB
        for name in "ab":
            assert [inboxes[name].next().tag[0] for _ in range(100)] == list(range(100))


def test_a_wait_for_room_ends_when_the_endpoint_is_closed() -> None:
    opened = Endpoint("a", "run", UNSHAPED, Inbox(), bind=None, limits=Limits(max_queued_bytes=MB))
    opened.connect("b", "tcp://127.0.0.1:9")
    opened.send("b", b"", [bytes(MB)])
    closing = threading.Timer(0.2, opened.close)
    closing.start()
    start = time.monotonic()
    with suppress(IsthmusError):  # what is closing drops everything, so there may be room for a moment
        opened.send("b", b"", [bytes(MB)], timeout_s=20.0)
    assert time.monotonic() - start < 5.0
    closing.join()


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
        assert "b: the I/O thread broke: RuntimeError('a fault of ours')" in str(inboxes["b"].next_error())
        assert not endpoints["a"].flush(0.1)
        eventually(lambda: not any(thread.name == "netem b" for thread in threading.enumerate()))
        with pytest.raises(IsthmusError, match="closed"):
            endpoints["b"].send("a", b"x")


def test_a_port_in_use_is_one_clear_line() -> None:
    with endpoint("a") as (a, _), pytest.raises(ConfigError) as raised:
        Endpoint("b", "run", UNSHAPED, Inbox(), bind=a.address)
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
            with pytest.raises(ConfigError, match=r"address of b = .* names no single host and port"):
                a.connect("b~1", address)
        with pytest.raises(ConfigError, match="not an IPv6 address"):
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
