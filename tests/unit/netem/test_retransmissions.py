"""The kernel's counts, on a connection of this process."""

from __future__ import annotations

import socket
import sys

import pytest

from netem.retransmissions import segments_to


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
