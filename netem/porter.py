"""The porter of one endpoint: sockets around `netem.door`, and the answers to ZeroMQ's authentication requests (ZAP).

Callers are heard only after a handshake: by CURVE, or on this machine by a proof that they know what the members share
(PLAIN). A caller who is not known yet waits for its answer, because the roster that names it may be on its way; if
nothing comes, ZeroMQ closes the connection. Callers name themselves within the handshake (the property X-Peer), and the
name must belong to the key. ZeroMQ's own routing identities are not used: with them, whoever knows a member's name
could take over its connection.

ZeroMQ offers no way to close one inbound connection. So the porter shuts down the TCP connection below it, and ZeroMQ
finds it at its end. All methods belong to the thread of the sockets.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import zmq
from zmq.utils import z85

from netem.door import Door, DoorLimits
from netem.errors import NotAdmitted
from netem.keys import Access, proof
from netem.names import certifies

_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"isthmus"
_NAME = "X-Peer"
_NEWS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENT = struct.Struct("=hi")  # RFC of zmq_socket_monitor: the event, and its value
_METADATA = 95  # ZMQ_METADATA, which pyzmq does not name
_FAILURES, _FAILING_S = 6, 2.0  # after so many failed handshakes, over that time, the callee is asked
_PROBE_S = 0.5


class Request:
    """A caller's handshake that waits for an answer."""

    def __init__(self, parts: list[bytes], now: float) -> None:
        self.route, _, self.version, self.sequence, _, _, _, mechanism = parts[:8]
        self.mechanism = mechanism
        self.credentials = parts[8:]
        self.came = now


class Callee:
    """A peer that is dialled, and how it answers. `news` has the outcomes of handshakes."""

    def __init__(self, address: str, news: zmq.Socket[bytes]) -> None:
        self.news = news
        self._address = address
        self._met = False
        self._failures = 0
        self._since = 0.0
        self._speaks = False  # it has been asked, and speaks ZeroMQ's protocol

    def refuses(self, succeeded: bool, now: float) -> bool:
        """Note the outcome of a handshake. True, once, for a peer that has never let this endpoint in and goes on so.

        A peer that did let it in has its key, and is only away. So is one in whose place something else answers, such
        as a container's proxy; ZeroMQ says no more than that the handshake failed, so this is tried here. The failures
        before may be the proxy's, and the peer may have come meanwhile; so one more counts.
        """
        if succeeded or self._met:
            self._met = True
            return False
        if self._speaks:
            self._speaks = False
            return True
        if not self._failures:
            self._since = now
        self._failures += 1
        if self._failures >= _FAILURES and now - self._since >= _FAILING_S:
            self._failures = 0
            self._speaks = _speaks_zmtp(self._address)
        return False


class Porter:
    """Guards the ROUTER, and proves who this endpoint is to those that it dials."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str, access: Access, limits: DoorLimits) -> None:
        self.door = Door(limits)
        self.shared = ""
        self.refused: list[NotAdmitted] = []
        """Peers that end the handshakes of this endpoint, since the caller last emptied this list."""
        self._context = context
        self._name = name
        self._access = access
        self._handshake_s = limits.handshake_s
        self._members: dict[str, str] = {}  # keys of the peers that may call
        self._held: list[Request] = []
        self._callers: dict[bytes, str] = {}  # names of the callers, by ZeroMQ's number of the connection
        self._routes: dict[str, bytes] = {}  # the latest connection of each caller
        self._numbers: dict[int, bytes] = {}  # connections by descriptor
        self._port = 0
        self._surplus = 0  # connections shut here whose handshakes have not been reported as failed yet
        self._router: zmq.Socket[bytes] | None = None
        self._zap: zmq.Socket[bytes] | None = None
        self._news: zmq.Socket[bytes] | None = None
        self._callees: dict[str, Callee] = {}  # peers that are dialled with their key

    # ── Sockets ──────────────────────────────────────────────────────────────────────────────────────────────────

    def guard(self, router: zmq.Socket[bytes]) -> list[int]:
        """Have the callers of a ROUTER, which is not bound yet, judged here. The descriptors that signal work."""
        self._router = router
        self._zap = self._context.socket(zmq.ROUTER)
        self._zap.linger = 0
        self._zap.bind(_ZAP)
        router.zap_domain = _DOMAIN
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no handler, no entry
        router.handshake_ivl = round(self._handshake_s * 1000)
        if self._access.encrypts:
            router.curve_server = True
            router.curve_secretkey = self._access.pair.secret.encode()
        else:
            router.plain_server = True
        self._news = router.get_monitor_socket(_NEWS | _HANDSHAKES)
        return [_descriptor(self._zap), _descriptor(self._news)]

    def bound(self, address: str) -> None:
        """The ROUTER listens at `address`."""
        self._port = int(address.rpartition(":")[2])

    def prepare(self, dealer: zmq.Socket[bytes], peer: str, address: str, key: str, encrypted: bool) -> int | None:
        """Have a DEALER prove to `peer` who this endpoint is. With a key, the peer must prove that it is its own.

        Returns the descriptor that signals work, if there is one.
        """
        dealer.setsockopt(_METADATA, f"{_NAME}:{self._name}".encode())
        dealer.probe_router = True  # so that the peer can answer over a new connection before it hears anything
        if not key or not encrypted:
            dealer.plain_username = self._name.encode()
            dealer.plain_password = proof(self.shared, self._name, peer).encode()
            return None
        dealer.curve_serverkey = key.encode()
        dealer.curve_publickey = self._access.pair.public.encode()
        dealer.curve_secretkey = self._access.pair.secret.encode()
        self._callees[peer] = Callee(address, dealer.get_monitor_socket(_HANDSHAKES))
        return _descriptor(self._callees[peer].news)

    def leave(self, dealer: zmq.Socket[bytes], peer: str) -> int | None:
        """The DEALER of `peer` is to be closed. Returns the descriptor that no longer signals work."""
        callee = self._callees.pop(peer, None)
        if callee is None:
            return None
        descriptor = _descriptor(callee.news)
        dealer.disable_monitor()
        callee.news.close(linger=0)
        return descriptor

    def close(self) -> None:
        """Close what was opened here, before the ROUTER and the DEALERs are. May be called twice."""
        if self._router is not None:
            self._router.disable_monitor()
        for own in (self._news, self._zap):
            if own is not None:
                own.close(linger=0)
        self._router = self._news = self._zap = None

    # ── Who may call ─────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, peer: str, key: str) -> None:
        """The peer may call from now on."""
        self._members[peer] = key
        for request in self._held[:]:
            self._judge(request)

    def bar(self, peer: str) -> None:
        """The peer may not call any more."""
        self._members.pop(peer, None)

    def caller(self, parts: list[zmq.Frame]) -> str | None:
        """The name of the caller that sent this frame of the ROUTER; None if the frame is to be dropped."""
        number = parts[0].bytes
        name = self._callers.get(number)
        if name is None:
            name = self._identify(number, parts[-1])
        return name if len(parts) > 2 else None  # the empty frame by which ZeroMQ begins has no more

    def route(self, peer: str) -> bytes | None:
        """ZeroMQ's number of the connection over which the peer has called last; None if it has not."""
        return self._routes.get(peer)

    def seen_from(self, name: str) -> str:
        """The IP address that this caller's latest connection comes from; empty if it has ended."""
        number = self._routes.get(name)
        return next((self._source(at) or "" for at, other in self._numbers.items() if other == number), "")

    def hang_up(self, name: str) -> None:
        """Close the latest connection of this caller."""
        number = self._routes.get(name)
        for descriptor, other in self._numbers.items():
            if other == number:
                self._shut(descriptor)

    def _identify(self, number: bytes, part: zmq.Frame) -> str | None:
        descriptor = int(part.get(zmq.SRCFD))
        try:
            name, user = str(part.get(_NAME)), str(part.get("User-Id"))
        except zmq.ZMQError:
            name = user = ""
        if not (certifies(name, user) if self._access.encrypts else name == user) or not name:
            self.door.counters.misnamed += 1
            self._shut(descriptor)
            return None
        self._callers[number] = name
        self._routes[name] = number
        self._numbers[descriptor] = number
        self.door.proved(descriptor)
        return name

    # ── Work ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def work(self, now: float) -> None:
        """Handle all that has come. To be called whenever one of the descriptors has signalled."""
        if self._news is not None:
            for event, value in _events(self._news):
                self._note(event, value, now)
        if self._zap is not None:
            while _readable(self._zap):
                self._hear(self._zap.recv_multipart(zmq.NOBLOCK), now)
        for peer, callee in self._callees.items():
            for event, _ in _events(callee.news):
                if callee.refuses(event == zmq.EVENT_HANDSHAKE_SUCCEEDED, now):
                    self.refused.append(NotAdmitted(peer))

    def _note(self, event: int, value: int, now: float) -> None:
        counters = self.door.counters
        if event == zmq.EVENT_ACCEPTED:
            source = self._source(value)
            surplus = None if source is None else self.door.accepted(value, source, now)
            if surplus is not None:
                self._shut(surplus)
                self._surplus += 1
        elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            self.door.closed(value)
            number = self._numbers.pop(value, b"")
            name = self._callers.pop(number, "")
            if self._routes.get(name) == number:
                del self._routes[name]
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            counters.keyless += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            if self._surplus:
                self._surplus -= 1  # it was broken off here, and is counted already
            else:
                counters.abandoned += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            counters.denied += 1

    def _hear(self, parts: list[bytes], now: float) -> None:
        if len(parts) < 9:
            return  # libzmq sends whole requests only
        self._held = [request for request in self._held if now - request.came < self._handshake_s]
        self._held.append(Request(parts, now))
        self._judge(self._held[-1])

    def _judge(self, request: Request) -> None:
        """Answer a request if its answer is known."""
        if request.mechanism == b"CURVE" and self._access.encrypts:
            user = z85.encode(request.credentials[0]).decode()
            invited = self._access.invited
            verdict = True if invited is None or user in invited or user in self._members.values() else None
        elif request.mechanism == b"PLAIN" and not self._access.encrypts:
            user = request.credentials[0].decode("utf-8", "backslashreplace")
            shown = request.credentials[1] if len(request.credentials) > 1 else b""
            expected = proof(self.shared, user, self._name).encode()
            verdict = hmac.compare_digest(shown, expected) and bool(self.shared) if user in self._members else None
        else:
            user, verdict = "", False
        if verdict is not None:
            self._held.remove(request)
            self._answer(request, user if verdict else "")

    def _answer(self, request: Request, user: str) -> None:
        assert self._zap is not None
        status, text = (b"200", b"OK") if user else (b"400", b"unknown")
        reply = [request.route, b"", request.version, request.sequence, status, text, user.encode(), b""]
        self._zap.send_multipart(reply, zmq.NOBLOCK)

    def _source(self, descriptor: int) -> str | None:
        """The address of an inbound connection; None if it has ended."""
        with _borrowed(descriptor) as connection, suppress(OSError):
            return str(connection.getpeername()[0]) if connection else None
        return None

    def _shut(self, descriptor: int) -> None:
        """Shut an inbound connection down, unless the descriptor stands for something else by now."""
        with _borrowed(descriptor) as connection, suppress(OSError):  # which means that it has ended
            if connection and connection.getsockname()[1] == self._port:
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket | None]:
    """A connection of ZeroMQ's, by a duplicate of its descriptor; None if that is no longer a socket."""
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        yield None
        return
    with connection:
        yield connection


def _speaks_zmtp(address: str) -> bool:
    """Whether what listens there sends the first byte of ZeroMQ's greeting."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S) as connection:
            return connection.recv(1) == b"\xff"
    except OSError:
        return False


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    """The descriptor that signals the next arrival: only after the socket has once been found empty."""
    socket.getsockopt(zmq.EVENTS)
    return int(socket.getsockopt(zmq.FD))


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _events(monitor: zmq.Socket[bytes]) -> list[tuple[int, int]]:
    found = []
    while _readable(monitor):
        head = monitor.recv_multipart(zmq.NOBLOCK)[0]
        found.append(_EVENT.unpack(head[: _EVENT.size]))
    return found
