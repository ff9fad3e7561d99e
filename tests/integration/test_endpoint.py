"""Messages over real sockets: what arrives, what is dropped and counted, and which peers are reported as failed."""

from __future__ import annotations

import os
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
from helpers.endpoints import LOCAL, Inbox, endpoint, eventually, network

from netem.endpoint import STRANGERS, Endpoint
from netem.errors import IsthmusError, PeerSilent, ProtocolError, QueueFull
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile

pytestmark = pytest.mark.alone

MB = 10**6
IMPATIENT = Limits(silent_s=0.6, resend_s=0.2)


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
        with pytest.raises(QueueFull, match=r"a: \d+ bytes wait to be sent; the limit is 1000000"):
            endpoints["a"].send("b", b"", [bytes(100)])
        start = time.monotonic()
        with pytest.raises(QueueFull):
            endpoints["a"].send("b", b"", [bytes(100)], timeout_s=0.2)
        assert 0.2 <= time.monotonic() - start < 1.0
        endpoints["a"].send("b", b"", [bytes(100)], urgent=True)  # control is never held up


def test_what_is_passed_on_has_room_and_keeps_the_generation_in_which_it_came() -> None:
    """From the I/O thread, which cannot wait for room."""
    with network("a", "b", "c", limits=Limits(max_queued_bytes=1)) as (endpoints, inboxes):
        for endpoint_of in endpoints.values():
            endpoint_of.set_generation(3)

        class Relay(Inbox):
            def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
                for came_in in (generation - 1, generation):
                    endpoints["b"].pass_on("c", tag + b"%d" % came_in, buffer, came_in, flow=2)

        endpoints["b"]._engine._receiver = endpoints["b"]._engine.peers.meet("a").assembler._receiver = Relay()
        endpoints["a"].send("b", b"one", [b"12345"])
        assert inboxes["c"].next()[1:4] == (3, b"one3", b"12345")
        assert endpoints["b"].flush(5.0), "the one of a generation that is over was dropped"
        assert inboxes["c"].deliveries.empty()


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
