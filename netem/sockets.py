"""The ZeroMQ sockets of one endpoint, and a precise wait: the only module that imports zmq.

One ROUTER is bound for all callers; one DEALER dials each peer. Comments say what libzmq does not do by itself. The
thread that builds the endpoint opens the sockets; later only the I/O thread uses them, except for `wake`. The wait is
`select` on one descriptor that stands for all others: it is precise to microseconds, where zmq's poller and epoll are
precise to milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import select
import selectors
import time
from collections.abc import Iterator
from socket import getaddrinfo

import zmq

from netem.door import DoorCounters, DoorLimits
from netem.errors import ConfigError, NotAdmitted
from netem.keys import Access
from netem.limits import COPY_BYTES, MAX_SEGMENT_BYTES, Limits
from netem.porter import Porter
from netem.segments import Payload

_ADDRESS = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:/\s]+):(?P<port>\d{1,5}|\*)", re.ASCII)
_EVERYWHERE = {"*", "0.0.0.0", "[::]"}
Frame = zmq.Frame

# Plain integers: to combine zmq's enum members costs as much as a send.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE) | _NOBLOCK
_HEADER_BYTES = 1024  # more than a header has besides its tag
_SELECTABLE = 1024  # FD_SETSIZE: `select` takes only smaller descriptors
_PORTER = "\0porter"  # stands for the porter's descriptors in the selector; no peer has such a name
_DOOR = DoorLimits()
_KEEPALIVE_S = 60
_BURST = 32  # frames read at once; more would delay the writes


class Sockets:
    """The sockets. `address` is the ROUTER's, or empty if there is none."""

    def __init__(
        self,
        name: str,
        bind: str | None,
        limits: Limits,
        access: Access | None = None,
        door: DoorLimits = _DOOR,
    ) -> None:
        self._name = name.encode()
        self._limits = limits
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._answering: set[str] = set()
        self._stirred: set[str] = set()  # peers whose DEALER may hold frames that its descriptor does not signal
        self._router: zmq.Socket[bytes] | None = None
        self._context = zmq.Context()
        self._porter = Porter(self._context, name, access, door) if access else None
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, "")
        self.address = ""
        if bind is not None:
            try:
                self._router = self._bind(bind)
            except BaseException:
                self.close(0)
                raise
            self.address = _text(self._router.getsockopt(zmq.LAST_ENDPOINT))

    def connect(self, peer: str, address: str, answers_only: bool, key: str = "", encrypted: bool = True) -> None:
        """Dial `peer`. Frames written before it answers wait in the socket. The same address again changes nothing.

        With `answers_only`, a caller that uses the peer's name is not the peer (see `read`). `key` is the peer's public
        key; `encrypted` says whether its callers speak CURVE.
        """
        if answers_only:
            self._answering.add(peer)
        if self._porter is not None and not answers_only:
            self._porter.admit(peer, key)
        if self._addresses.get(peer) == address:
            return
        self.disconnect(peer)
        dealer = self._open(zmq.DEALER, address, peer)
        if self._porter is None:
            dealer.routing_id = self._name
        else:
            news = self._porter.prepare(dealer, peer, address, key, encrypted)
            if news is not None:
                self._selector.register(news, selectors.EVENT_READ, _PORTER)
        dealer.reconnect_ivl = 20
        dealer.reconnect_ivl_max = 500
        self._dealers[peer] = dealer  # stored before a call that may fail, so that `close` finds it
        self._addresses[peer] = address
        dealer.connect(address)

    def disconnect(self, peer: str) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            del self._addresses[peer]
            self._answering.discard(peer)
            self._stirred.discard(peer)
            self._selector.unregister(_descriptor(dealer))
            if self._porter is not None:
                news = self._porter.leave(dealer, peer)
                if news is not None:
                    self._selector.unregister(news)
            dealer.close(linger=0)

    def bar(self, peer: str) -> None:
        """Refuse the peer's calls from now on."""
        if self._porter is not None:
            self._porter.bar(peer)

    def share(self, secret: str) -> None:
        """Take the secret by which members prove to each other, where they do not encrypt, that they are members."""
        if self._porter is not None:
            self._porter.shared = secret

    def refused(self) -> list[NotAdmitted]:
        """Peers that refuse this endpoint, each once."""
        if self._porter is None:
            return []
        refused, self._porter.refused = self._porter.refused, []
        return refused

    def seen_from(self, peer: str) -> str:
        """The IP address that this peer calls from; empty if it does not call, or may without a handshake."""
        return "" if self._porter is None else self._porter.seen_from(peer)

    def hang_up(self, peer: str) -> None:
        """Close the connection by which this peer has called."""
        if self._porter is not None:
            self._porter.hang_up(peer)

    @property
    def door(self) -> DoorCounters | None:
        """The totals of connections; None if all may call."""
        return self._porter.door.counters if self._porter is not None else None

    def write(self, peer: str, header: bytes, payload: Payload) -> bool:
        """Give a frame to ZeroMQ without blocking. False if there is no connection to the peer: the frame is lost."""
        try:
            socket = self._dealers.get(peer)
            if socket is None:
                socket = self._router
                if socket is None:
                    return False
                route = peer.encode() if self._porter is None else self._porter.route(peer)
                if route is None:
                    return False
                socket.send(route, _MORE)
            else:
                self._stirred.add(peer)
            socket.send(header, _MORE)
            socket.send(payload, _NOBLOCK, copy=len(payload) <= COPY_BYTES)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def read(self) -> Iterator[tuple[str, list[Frame]]]:
        """Some of the frames that have arrived: the sender's name, and the parts after it.

        The name is empty if a caller uses the name of a peer that was dialled with `answers_only`.

        A DEALER is asked only after its descriptor signalled or something was written to it, which may take the signal
        away. To ask every one of them each time is a large part of the work of a node with many peers.
        """
        if self._router is not None:
            for parts in _drain(self._router):
                name = self._caller(parts)
                if name is not None:
                    yield "" if name in self._answering else name, parts[1:]
        signalled = {key.data for key, _ in self._selector.select(0)}
        if _PORTER in signalled and self._porter is not None:
            self._porter.work(time.monotonic())
        for peer in self._stirred.union(signalled):
            dealer = self._dealers.get(peer)
            if dealer is None:
                continue  # the ROUTER, or the pipe of `wake`
            frames = 0
            for parts in _drain(dealer):
                frames += 1
                yield peer, parts
            if frames == _BURST:
                self._stirred.add(peer)
            else:
                self._stirred.discard(peer)

    def _caller(self, parts: list[Frame]) -> str | None:
        if self._porter is not None:
            return self._porter.caller(parts)
        return parts[0].bytes.decode("utf-8", "backslashreplace")

    def wait(self, timeout_s: float) -> None:
        """Sleep until a frame, a `wake` or the timeout.

        Call it only after `read` has found nothing: a ZeroMQ descriptor signals new frames, not those already there.
        """
        timeout_s = max(timeout_s, 0.0)
        if self._selector.fileno() < _SELECTABLE:
            select.select([self._selector], [], [], timeout_s)
        else:  # with more than a thousand open files: up to a millisecond late
            self._selector.select(timeout_s)

    def wake(self) -> None:
        """End the `wait` of the I/O thread. Any thread may call this."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_writer, b"\0")

    def woken(self) -> None:
        """Read what `wake` wrote."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)

    def close(self, linger_s: float) -> None:
        """Close everything within about `linger_s`, during which written frames may still leave."""
        if self._porter is not None:
            for peer, dealer in self._dealers.items():
                self._porter.leave(dealer, peer)
            self._porter.close()
        for socket in (self._router, *self._dealers.values()):
            if socket is not None:
                socket.close(linger=round(linger_s * 1000))
        self._context.term()
        self._selector.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _bind(self, bind: str) -> zmq.Socket[bytes]:
        if parse_address(bind, "bind") in _EVERYWHERE:
            raise ConfigError(
                f"bind = {bind!r}: name one interface, such as tcp://127.0.0.1:0 on this machine or tcp://eth0:5555"
            )
        router = self._open(zmq.ROUTER, bind, "")
        router.rcvhwm = self._limits.max_unread_frames
        router.maxmsgsize = max(self._limits.max_frame_bytes, self._limits.max_tag_bytes) + _HEADER_BYTES
        router.router_mandatory = True  # otherwise frames that cannot be routed are dropped in silence
        router.router_handover = self._porter is None  # otherwise a restarted peer with the same name is never heard
        if self._porter is not None:
            for news in self._porter.guard(router):
                self._selector.register(news, selectors.EVENT_READ, _PORTER)
        try:
            router.bind(bind)
        except zmq.ZMQError as error:
            self._selector.unregister(_descriptor(router))
            if self._porter is not None:
                self._porter.close()
            router.close(linger=0)
            raise ConfigError(f"bind = {bind!r}: {_mend(error)}") from None
        if self._porter is not None:
            self._porter.bound(_text(router.getsockopt(zmq.LAST_ENDPOINT)))
        return router

    def _open(self, kind: int, address: str, peer: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.ipv6 = "[" in address
        socket.linger = 0
        # The kernel finds connections whose other end is gone without a word; or they would count for ever.
        socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, _KEEPALIVE_S
        socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = _KEEPALIVE_S // 4, 4
        # No high-water marks: they count messages, not bytes, and a ROUTER drops at its mark. Credit bounds the bytes.
        socket.sndhwm = 0
        socket.rcvhwm = 0
        socket.maxmsgsize = max(MAX_SEGMENT_BYTES, self._limits.max_tag_bytes) + _HEADER_BYTES
        self._selector.register(_descriptor(socket), selectors.EVENT_READ, peer)
        return socket


def parse_address(address: str, key: str, *, dial: bool = False) -> str:
    """The host of "tcp://HOST:PORT". For `dial`, it must be one host and one port. Raises `ConfigError`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or (match["port"] != "*" and int(match["port"]) > 65535):
        raise ConfigError(f"{key} = {address!r}: expected tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    if match["host"].startswith("[") and not _is_ipv6(match["host"][1:-1]):
        raise ConfigError(f"{key} = {address!r}: expected an IPv6 address in the brackets")
    if dial and (match["host"] in _EVERYWHERE or match["port"].strip("*0") == ""):
        raise ConfigError(
            f"{key} = {address!r}: expected one host and one port, those at which the peer listens, "
            "such as tcp://127.0.0.1:5555"
        )
    return match["host"]


def advertised(bound: str, place: str) -> str:
    """The address for the peers: the bound one, or that of `place`, HOST or HOST:PORT (behind NAT, in a container).

    Raises `ConfigError`, which names --advertise.
    """
    if not place:
        return bound
    address = f"tcp://{place}" if re.search(r":\d+$", place) else f"tcp://{place}:{bound.rpartition(':')[2]}"
    try:
        parse_address(address, "--advertise", dial=True)
    except ConfigError:
        raise ConfigError(f"--advertise {place!r}: expected HOST or HOST:PORT, such as 203.0.113.7:7071") from None
    return address


def check_host(host: str, key: str) -> None:
    """Raise `ConfigError`, which names `key`, where `host` has no address; ZeroMQ would try again without a word."""
    name = host.strip("[]")
    try:
        getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(
            f"{key}: the host {name} has no address here ({why}); "
            f"check the name (getent hosts {name}), or give an address"
        ) from None


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _drain(socket: zmq.Socket[bytes]) -> Iterator[list[Frame]]:
    for _ in range(_BURST):
        if not int(socket.getsockopt(_EVENTS)) & _POLLIN:  # cheaper than the exception of a read that finds nothing
            return
        parts = [socket.recv(_NOBLOCK, copy=False)]
        while parts[-1].more:
            parts.append(socket.recv(_NOBLOCK, copy=False))
        yield parts


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))


def _text(option: bytes | int) -> str:
    assert isinstance(option, bytes)
    return option.rstrip(b"\0").decode()


def _mend(error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop the process that uses it (see ss -ltnp), or take another, or 0 for a free one"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return "this machine has no such interface; give one of its addresses (ip addr), or tcp://127.0.0.1:PORT"
    if error.errno == errno.EACCES:
        return "ports below 1024 need special rights; take a higher one"
    return f"cannot be bound: {error.strerror}"
