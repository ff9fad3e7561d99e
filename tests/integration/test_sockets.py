"""The sockets of an endpoint against raw ZeroMQ: every frame is read, although a descriptor signals only once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from helpers.endpoints import LOCAL

from netem.limits import Limits
from netem.sockets import Sockets

FRAMES = 100  # more than one reading takes


@contextmanager
def dialled() -> Iterator[tuple[Sockets, zmq.Socket[bytes]]]:
    """Sockets named "a" that have dialled the peer "b", and the ROUTER that they reach."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = 10_000
        router.bind(LOCAL)
        sockets = Sockets("a", None, Limits())
        try:
            sockets.connect("b", str(router.last_endpoint.rstrip(b"\0"), "ascii"), answers_only=False)
            sockets.write("b", b"hello", b"")
            router.recv_multipart()
            yield sockets, router
        finally:
            sockets.close(0.0)


@pytest.mark.parametrize("writes", [False, True], ids=["only reads", "writes between readings"])
def test_all_frames_are_read_that_came_with_one_signal(writes: bool) -> None:
    with dialled() as (sockets, router):
        for number in range(FRAMES):
            router.send_multipart([b"a", bytes([number]), b"payload"])
        time.sleep(0.3)  # until all are there: no signal comes later
        got: list[int] = []
        deadline = time.monotonic() + 10
        while len(got) < FRAMES and time.monotonic() < deadline:
            if writes:
                sockets.write("b", b"header", b"")  # handles the socket's commands, and so may take the signal away
            before = len(got)
            for peer, parts in sockets.read():
                assert peer == "b"
                got.append(parts[0].bytes[0])
            if len(got) == before:
                sockets.wait(0.5)
        assert got == list(range(FRAMES))
