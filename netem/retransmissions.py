"""How many segments TCP has sent to a peer, and how many of them again: the loss that our frames do not show.

TCP repeats what is lost, so every frame arrives, late. The kernel counts (TCP_INFO in tcp(7), the fields of
linux/tcp.h), and only Linux tells.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_DESCRIPTORS = Path("/proc/self/fd")
_TOTAL_RETRANS, _DATA_SEGS_OUT = struct.Struct("=100xI"), struct.Struct("=156xI")
_INFO_BYTES = 160


class Segments(NamedTuple):
    """Segments with data of all connections of this process to one address."""

    sent: int
    """Those that were sent again included."""
    repeated: int


def segments_to(host: str, port: int) -> Segments | None:
    """The count for connections that this process has opened to `host`; None where the kernel does not tell, or there
    is no such connection."""
    if sys.platform != "linux":
        return None
    with suppress(OSError, UnicodeError):
        wanted = {(found[4][0], found[4][1]) for found in socket.getaddrinfo(host.strip("[]"), port)}
        counts = [count for target, count in _connections() if target in wanted]
        if counts:
            return Segments(sum(count.sent for count in counts), sum(count.repeated for count in counts))
    return None


def _connections() -> Iterator[tuple[tuple[str, int], Segments]]:
    for name in os.listdir(_DESCRIPTORS):
        with suppress(OSError):  # closed meanwhile, not a socket, or not connected
            if not os.readlink(_DESCRIPTORS / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
                if len(info) < _INFO_BYTES:
                    continue
                host, port = connection.getpeername()[:2]
                (repeated,), (sent,) = _TOTAL_RETRANS.unpack_from(info), _DATA_SEGS_OUT.unpack_from(info)
                yield (host, port), Segments(sent, repeated)
