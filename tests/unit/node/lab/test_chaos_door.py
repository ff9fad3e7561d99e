"""The door before a node: what it does to what passes, over real connections on 127.0.0.1."""

import json
import random
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from netem.children import Child, Children
from node.lab.chaos.door import flipped
from node.lab.chaos.schedule import Kind

WAIT_S = 20.0


@contextmanager
def echoing() -> Iterator[int]:
    """A server that sends back what it gets; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(caller,), daemon=True).start()

    def echo(caller: socket.socket) -> None:
        with caller:
            try:
                while piece := caller.recv(1 << 16):
                    caller.sendall(piece)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def door() -> Iterator[tuple[Child, int]]:
    with echoing() as port, Children() as children:
        command = [sys.executable, "-m", "node.lab.chaos.door", str(port)]
        child = children.start("door", command, talks=True)
        yield child, json.loads(child.hear(WAIT_S))["port"]


def tell(child: Child, kind: Kind | None) -> None:
    child.tell(b'{"kind": null}' if kind is None else f'{{"kind": "{kind}", "seed": 1}}'.encode())


def echoed(caller: socket.socket, sent: bytes, wait_s: float = WAIT_S) -> bytes:
    """What comes back of what is sent, until as much has come, the connection ends, or the time is over."""
    caller.settimeout(wait_s)
    caller.sendall(sent)
    found = b""
    try:
        while len(found) < len(sent) and (piece := caller.recv(1 << 16)):
            found += piece
    except TimeoutError:
        pass
    return found


def test_an_open_door_lets_everything_pass(door: tuple[Child, int]) -> None:
    sent = random.Random(0).randbytes(1 << 20)
    with socket.create_connection(("127.0.0.1", door[1])) as caller:
        thread = threading.Thread(target=caller.sendall, args=(sent,))
        thread.start()
        caller.settimeout(WAIT_S)
        found = b""
        while len(found) < len(sent) and (piece := caller.recv(1 << 16)):
            found += piece
        thread.join(WAIT_S)
    assert found == sent


@pytest.mark.parametrize("kind", [Kind.DEAF, Kind.MUTE, Kind.CUT])
def test_what_was_held_back_goes_on_afterwards(door: tuple[Child, int], kind: Kind) -> None:
    child, port = door
    with socket.create_connection(("127.0.0.1", port)) as caller:
        assert echoed(caller, b"before") == b"before"
        tell(child, kind)
        deaf = b""
        while not deaf:  # until the door has heard of it
            deaf = b"x" if echoed(caller, b"y", 0.3) == b"" else b""
        tell(child, None)
        caller.settimeout(WAIT_S)
        assert caller.recv(1) == b"y"


def test_one_bit_is_flipped() -> None:
    source = random.Random(0)
    for length in (1, 7, 1000):
        piece = source.randbytes(length)
        harmed = flipped(piece, source)
        assert sum((one ^ other).bit_count() for one, other in zip(piece, harmed, strict=True)) == 1


@pytest.mark.parametrize("kind", [Kind.CORRUPT, Kind.TRUNCATE])
def test_harm_comes_now_and_then(door: tuple[Child, int], kind: Kind) -> None:
    child, port = door
    tell(child, kind)
    sent = bytes(1000)
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", port)) as caller:
            if any(echoed(caller, sent) != sent for _ in range(5)):
                return
    pytest.fail("nothing was harmed in 1000 messages")
