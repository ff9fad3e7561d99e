"""Host and guest of a survey with endpoint, clock and threads around them (`coordinator.survey.host`, `.guest`)."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.doorkeeper import Doorkeeper
from coordinator.messages import COORDINATOR, PROTOCOL_VERSION, Refused
from coordinator.server import LIMITS
from coordinator.survey.guest import Action, Answer, CountSegments, Dial, Guest, Say, Shoot, Tell
from coordinator.survey.host import Action as HostAction
from coordinator.survey.host import Host, Judge, Phase, Send, Survey, Trust
from coordinator.survey.line import Arrival, Body, Line, Shot, clock_s, take
from coordinator.survey.messages import MOST_GUESTS, Arrive, Facts, Probe, Seat, Verdict, from_guest, from_host
from netem.door import DoorLimits
from netem.errors import ConfigError, IsthmusError, NotAdmitted, PeerSilent, ProtocolError, RunAborted
from netem.keys import Access
from netem.limits import Limits
from netem.retransmissions import segments_to

log = logging.getLogger("isthmus.doctor")

TICK_S = 0.25
FLUSH_S = 5.0
CONNECT_S = 5.0
JOIN_S = 20.0
"""How long a guest waits for the first word of the host."""

_DOOR = DoorLimits(most_new=64 + 2 * MOST_GUESTS, most_new_of_a_source=32 + MOST_GUESTS)
_NOT_ISTHMUS_DOCTOR = "this is isthmus doctor, which trains nothing; start isthmus coordinator for a run"

Verdicts = Callable[[Survey], Verdict]
"""What a survey means."""


class HostServer:
    """The host, on a thread of its own. It listens at `address` at once. Use it as a context.

    `own` is the name and the public key of the guest on its own machine, which needs no invitation.
    """

    def __init__(
        self, config: CoordinatorConfig, run_name: str, wait_s: float, own: tuple[str, str], judge: Verdicts
    ) -> None:
        self._door = Doorkeeper(config, run_name)
        self._door.welcome(*own)
        self.key = self._door.access.pair.public
        self._judge = judge
        self._host = Host(config.nodes, wait_s, self._door.shared, clock_s())
        limits = msgspec.structs.replace(LIMITS, max_strangers=LIMITS.max_strangers + config.nodes)
        self._line = Line(COORDINATOR, config.address, self._door.access, limits, self._door.limits, probes=False)
        self.address = self._line.endpoint.address
        self._stopped = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="survey")
        self._served: Future[None] | None = None

    def __enter__(self) -> HostServer:
        self._served = self._pool.submit(self._serve)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped = True
        try:
            if self._served is not None:
                self._served.result(2 * FLUSH_S)
        finally:
            self._pool.shutdown(wait=False)
            self._line.endpoint.close()

    def _serve(self) -> None:
        while self._host.phase is not Phase.OVER and not self._stopped:
            self._act(self._host.tick(clock_s()))
            take(self._line, self._handle, clock_s() + TICK_S)
        self._line.endpoint.flush(FLUSH_S)

    def _handle(self, arrival: Arrival) -> None:
        now_s = clock_s()
        if isinstance(arrival, Body):
            try:
                message = from_guest(arrival.body, arrival.peer)
            except ProtocolError:
                self._line.say(arrival.peer, Refused(reason=_NOT_ISTHMUS_DOCTOR))
                return
            if isinstance(message, Arrive):
                reason = self._door.imposture(arrival.peer, message.name, message.key)
                if reason is not None:
                    self._line.say(arrival.peer, Refused(reason=reason))
                    return
            self._act(self._host.receive(arrival.peer, message, arrival.seen_from, now_s))
        elif isinstance(arrival, PeerSilent):
            self._act(self._host.lost(arrival.peer, str(arrival), now_s))

    def _act(self, actions: list[HostAction]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._line.say(action.peer, action.message)
            elif isinstance(action, Trust):
                self._line.endpoint.trust(action.peer)
            elif isinstance(action, Judge):
                self._act(self._host.conclude(self._judge(action.survey)))


class Attendance(NamedTuple):
    """How one machine takes part: the addresses as in `isthmus node`, and what it says of itself."""

    join: str
    bind: str
    advertise: Callable[[str], str]
    """The address that it names, made of the one that was bound."""
    name: str
    config_digest: str
    facts: Facts
    access: Access
    lead: str
    """The host's public key."""


def attend(attendance: Attendance, tell: Callable[[str], None]) -> Verdict:
    """Take part in the survey of the host at `attendance.join`; the result.

    Raises `ConfigError` where no host is there or it refuses, and `RunAborted` where it ends before its result.
    """
    access = attendance.access
    line = Line(attendance.name, attendance.bind, access, Limits(max_strangers=0), _DOOR, probes=True)
    own_address = _split(line.endpoint.address)[0].strip("[]")  # an interface has been resolved by now
    try:
        arrive = Arrive(
            version=PROTOCOL_VERSION,
            name=attendance.name,
            key=access.pair.public,
            encrypted=access.encrypts,
            address=attendance.advertise(line.endpoint.address),
            config_digest=attendance.config_digest,
            facts=msgspec.structs.replace(attendance.facts, own_address=own_address),
        )
        line.endpoint.connect(COORDINATOR, attendance.join, answers_only=True, key=attendance.lead)
        return _Attendant(line, Guest(line.endpoint.name, arrive, JOIN_S, clock_s()), tell).attend(attendance)
    finally:
        line.endpoint.close()


class _Attendant:
    """One guest with its endpoint."""

    def __init__(self, line: Line, guest: Guest, tell: Callable[[str], None]) -> None:
        self._line, self._guest, self._tell = line, guest, tell
        self._seats: dict[str, Seat] = {}
        self._was_let_in = False

    def attend(self, attendance: Attendance) -> Verdict:
        guest = self._guest
        try:
            while not guest.over:
                self._act(guest.tick(clock_s()))
                take(self._line, self._handle, guest.next_s(clock_s()))
        except BaseException:
            self._act(guest.leave("it was interrupted"))
            self._line.endpoint.flush(1.0)
            raise
        if guest.verdict is not None:
            return guest.verdict
        if self._was_let_in:
            raise RunAborted(guest.failure)
        if guest.failure == "nobody answers":
            trouble = trouble_with(attendance.join) or "something listens there, and is no isthmus doctor"
            raise ConfigError(f"--join {attendance.join}: nobody answers: {trouble}")
        raise ConfigError(f"--join {attendance.join}: {guest.failure}")

    def _handle(self, arrival: Arrival) -> None:
        guest, now_s = self._guest, clock_s()
        if isinstance(arrival, Body):
            if arrival.peer == COORDINATOR:
                self._hear(arrival, now_s)
        elif isinstance(arrival, Shot):
            if isinstance(arrival.probe, Probe):
                self._act(guest.probed(arrival.peer, arrival.probe, arrival.at_s, now_s))
            else:
                self._act(guest.echoed(arrival.peer, arrival.probe, arrival.at_s, now_s))
        elif isinstance(arrival, NotAdmitted) and arrival.peer == COORDINATOR:
            guest.refused("it does not accept this key; all need the same ISTHMUS_TOKEN, or invitations of one run")
        elif isinstance(arrival, NotAdmitted):
            guest.dialled(arrival.peer, "another program, or another isthmus, answers at its address")
        elif isinstance(arrival, PeerSilent) and arrival.peer == COORDINATOR:
            guest.refused("the host cannot be reached any more")
        elif isinstance(arrival, _Dialled):
            guest.dialled(arrival.peer, arrival.trouble)

    def _hear(self, arrival: Body, now_s: float) -> None:
        try:
            message = from_host(arrival.body, COORDINATOR)
        except ProtocolError as error:
            self._guest.refused(f"what answers there is no isthmus doctor of this version ({error})")
            return
        self._was_let_in = self._was_let_in or not isinstance(message, Refused)
        self._act(self._guest.told(message, now_s))

    def _act(self, actions: list[Action]) -> None:
        line = self._line
        for action in actions:
            if isinstance(action, Say):
                line.say(COORDINATOR, action.message)
            elif isinstance(action, Shoot):
                line.shoot(action.peer, action.probe, action.nbytes)
            elif isinstance(action, Answer):
                line.answer(action.peer, action.echo)
            elif isinstance(action, Dial):
                self._dial(action)
            elif isinstance(action, CountSegments):
                self._act(self._guest.counted(self._count(action.peers), clock_s()))
            elif isinstance(action, Tell):
                self._tell(action.text)

    def _dial(self, dial: Dial) -> None:
        self._line.endpoint.share(dial.secret)
        for seat in dial.seats:
            self._seats[seat.peer] = seat
            self._line.endpoint.connect(seat.peer, seat.address, key=seat.key, encrypted=seat.encrypted)
            threading.Thread(target=self._try, args=(seat,), name=f"tries {seat.name}", daemon=True).start()

    def _try(self, seat: Seat) -> None:
        self._line.arrivals.put(_Dialled(seat.peer, trouble_with(seat.address)))

    def _count(self, peers: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        counted = {}
        for peer in peers:
            host, port = _split(self._seats[peer].address)
            if (segments := segments_to(host, port)) is not None:
                counted[peer] = (segments.sent, segments.repeated)
        return counted


class _Dialled(IsthmusError):
    """It has been tried to connect to a guest."""

    def __init__(self, peer: str, trouble: str) -> None:
        super().__init__(trouble)
        self.peer, self.trouble = peer, trouble


def trouble_with(address: str) -> str:
    """Why no connection to "tcp://HOST:PORT" can be opened from here, tried within `CONNECT_S`; empty if one can."""
    host, port = _split(address)
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=CONNECT_S) as connection:
            return "" if _greets(connection) else f"another program listens at {host}:{port}"
    except socket.gaierror:
        return f"the host {host} has no address here"
    except ConnectionRefusedError:
        return f"nothing listens at {host}:{port} (connection refused)"
    except TimeoutError:
        return f"{host}:{port} does not answer within {CONNECT_S:g} s: a firewall, or a port that is not forwarded"
    except OSError as error:
        return f"there is no way to {host}:{port} ({error.strerror or error})"


def _greets(connection: socket.socket) -> bool:
    """Whether the other end sends the first byte of ZeroMQ's greeting."""
    try:
        return connection.recv(1) == b"\xff"
    except OSError:
        return False


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)
