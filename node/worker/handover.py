"""Hands a member's state to a node that joins, over the shaped links: a thin shell of `node.train.transfer`.

What arrives goes from the endpoint's I/O thread into queues. A member answers joiners on a thread of its own, which
begins with the first request of a generation; until the joiner has all of it, the members wait at the barrier, and what
is handed over does not change. The joiner's side runs in the trainer's thread. Where its generation ends, what has
come is kept for the next one.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from netem.errors import IsthmusError, ProtocolError, QueueFull
from netem.names import plain
from netem.network import Profile
from node.exchange.inbox import Inbox, Members
from node.exchange.tags import encode_tag
from node.exchange.transfer_tags import MOST_WANTED, Ask, Decline, Offer, Piece, TransferTag, Want
from node.train.pieces import Packed, decode_catalogue, encode_catalogue, unpack
from node.train.transfer import PIECE_BYTES, Action, Donor, Joiner, Keep, Note, Say, State, Terms

log = logging.getLogger("isthmus.join")

TRANSFER_FLOW = 2
"""Pieces share a link fairly with what else is sent."""

MOST_CATALOGUE_BYTES = 128 << 20
MOST_REQUESTS = 256
"""Requests that wait for a member's answer, of all joiners together. A joiner repeats those that are dropped."""

POLL_S = 0.1
ROOM_S = 0.25


class Sender(Protocol):
    """The part of `netem.endpoint.Endpoint` that sends."""

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None: ...


class _Arrival(NamedTuple):
    peer: str
    tag: TransferTag
    buffer: memoryview


class _Begun(NamedTuple):
    """What has come of a state, where its transfer was broken off."""

    step: int
    data: memoryview
    have: dict[int, bytes]


def terms_for(profile: Profile, me: str, donors: Sequence[str]) -> Terms:
    """How patient to be on the slowest link from a donor, and how much may be on its way there. Names are plain."""
    links = [profile.link(donor, me) for donor in donors]
    nic_bps = profile.nic_down_bps(me) if profile.scope == "nic" else 0.0
    rates_bps = [rate for rate in (*(link.rate_bps for link in links), nic_bps) if rate]
    rate_bps = min(rates_bps, default=1e10)
    round_trip_s = 2 * max((link.latency_s + link.jitter_s for link in links), default=0.0)
    piece_s = PIECE_BYTES * 8 / rate_bps
    window = min(MOST_WANTED, max(2, math.ceil((round_trip_s + ROOM_S) / piece_s) + 1))
    retry_s = max(2.0, 4 * (window * piece_s + round_trip_s))
    return Terms(window, retry_s, max(10.0, 3 * retry_s), max(60.0, 10 * retry_s))


class Handover:
    """Both sides of one node's transfers. `serve`, `fetch` and `close` belong to the trainer's thread."""

    def __init__(self, sender: Sender, inbox: Inbox) -> None:
        self._sender = sender
        self._inbox = inbox
        self._service: _Service | None = None
        self._joiner: Joiner | None = None
        self._arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._begun: _Begun | None = None
        inbox.transfers = self

    def serve(self, share: Callable[[], Packed]) -> None:
        """Answer joiners in this generation with what `share` gives, once it is needed."""
        self.close()
        self._service = _Service(self._sender, share)

    def close(self) -> None:
        """Answer nobody any more; at the end of a generation, before the next one begins."""
        service, self._service = self._service, None
        if service is not None:
            service.close()

    def fetch(self, members: Members, step: int, cap_bytes: int, terms: Terms) -> dict[str, Tensor]:
        """Get the state after `step` steps from another member.

        Raises `GenerationOver` and `RunAborted` as every wait does, and `IsthmusError` where no member can give it.
        """
        self.close()
        donors = [peer for rank, peer in enumerate(members.peers) if rank != members.rank]
        begun = self._begun if self._begun and self._begun.step == step else None
        data = begun.data if begun else memoryview(b"")
        joiner = Joiner(donors, step, cap_bytes, terms, time.monotonic(), begun.have if begun else None)
        self._arrivals = queue.SimpleQueue()
        self._joiner = joiner
        try:
            self._carry_out(joiner.begin(time.monotonic()))
            while not joiner.over:
                self._inbox.raise_if_over()
                data = self._turn(joiner, data)
        finally:
            self._joiner = None
            self._begun = _Begun(step, data, joiner.have)
        if joiner.state is State.FAILED:
            raise IsthmusError(f"this node cannot join: {joiner.reason}")
        assert joiner.catalogue is not None
        self._begun = None
        log.info("got %d bytes of state after step %d from %s", joiner.fetched_bytes, step, plain(joiner.donor))
        return unpack(joiner.catalogue, data)

    def _turn(self, joiner: Joiner, data: memoryview) -> memoryview:
        """Handle what has arrived next, or let time pass. Returns where the state's bytes are."""
        try:
            peer, tag, buffer = self._arrivals.get(timeout=POLL_S)
        except queue.Empty:
            self._carry_out(joiner.tick(time.monotonic()))
            return data
        now_s = time.monotonic()
        if isinstance(tag, Offer):
            actions = self._offered(joiner, peer, buffer, now_s)
            if joiner.catalogue is not None and len(data) != joiner.catalogue.total_bytes:
                data = _resized(data, joiner.catalogue.total_bytes)
        elif isinstance(tag, Piece):
            actions = joiner.arrived(peer, tag.index, buffer, now_s)
            if Keep(tag.index) in actions:
                data[tag.index * PIECE_BYTES : tag.index * PIECE_BYTES + len(buffer)] = buffer
        else:
            actions = joiner.declined(peer, now_s)
        self._carry_out([*actions, *joiner.tick(now_s)])
        return data

    def _offered(self, joiner: Joiner, peer: str, buffer: memoryview, now_s: float) -> list[Action]:
        try:
            return joiner.offered(peer, decode_catalogue(buffer, peer), now_s)
        except ProtocolError as error:
            log.warning("%s", error)
            return joiner.declined(peer, now_s)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Say):
                with suppress(QueueFull):  # it is said again
                    self._sender.send(action.peer, encode_tag(action.message), flow=TRANSFER_FLOW, timeout_s=ROOM_S)
            elif isinstance(action, Note):
                log.warning("%s", action.text)

    # The I/O thread: node.exchange.inbox.Transfers.

    def admit(self, peer: str, tag: TransferTag, total_bytes: int) -> memoryview | None:
        most = {Offer: MOST_CATALOGUE_BYTES, Piece: PIECE_BYTES}.get(type(tag), 0)
        if total_bytes > most:
            what = f"{type(tag).__name__} of {total_bytes} bytes, at most {most} are allowed"
            raise ProtocolError(what, peer=peer)
        joiner = self._joiner
        if isinstance(tag, Offer | Piece | Decline) and (joiner is None or joiner.donor != peer):
            return None
        return memoryview(np.empty(total_bytes, np.uint8))  # type: ignore[arg-type]

    def deliver(self, peer: str, tag: TransferTag, buffer: memoryview) -> None:
        service = self._service
        if isinstance(tag, Ask | Want):
            if service is not None:
                service.request(peer, tag)
            elif self._joiner is not None:  # this node joins too
                with suppress(IsthmusError):
                    self._sender.send(peer, encode_tag(Decline()), flow=TRANSFER_FLOW)
        elif self._joiner is not None:
            self._arrivals.put(_Arrival(peer, tag, buffer))


class _Service:
    """A member's answers in one generation, on a thread that begins with the first request."""

    def __init__(self, sender: Sender, share: Callable[[], Packed]) -> None:
        self._sender = sender
        self._share = share
        self._requests: queue.Queue[tuple[str, Ask | Want] | None] = queue.Queue(MOST_REQUESTS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._begun = False

    def request(self, peer: str, message: Ask | Want) -> None:
        """A joiner asks."""
        with suppress(queue.Full):
            self._requests.put_nowait((peer, message))
        if not self._begun:
            self._begun = True
            self._thread.start()

    def close(self) -> None:
        """End the thread, which a piece that has no room to be sent holds up for a moment."""
        self._closed.set()
        with suppress(queue.Full):
            self._requests.put_nowait(None)
        if self._begun:
            self._thread.join()

    def _run(self) -> None:
        packed = self._share()
        donor, catalogue = Donor(packed.catalogue), memoryview(encode_catalogue(packed.catalogue))
        while not self._closed.is_set() and (request := self._requests.get()) is not None:
            peer, message = request
            try:
                actions = donor.receive(peer, message)
            except ProtocolError as error:
                log.warning("%s", error)
                continue
            for action in actions:
                if isinstance(action, Say) and not self._send(action, packed, catalogue):
                    return

    def _send(self, action: Say, packed: Packed, catalogue: memoryview) -> bool:
        """Send one answer, once there is room; False where the generation is over."""
        peer, message = action
        buffers = [packed.piece(message.index)] if isinstance(message, Piece) else []
        buffers = [catalogue] if isinstance(message, Offer) else buffers
        while not self._closed.is_set():
            try:
                self._sender.send(peer, encode_tag(message), buffers, flow=TRANSFER_FLOW, timeout_s=ROOM_S)
            except QueueFull:
                continue
            except IsthmusError:
                return False  # the endpoint is closed
            return True
        return False


def _resized(data: memoryview, nbytes: int) -> memoryview:
    """A buffer of so many bytes that begins as `data` does."""
    whole = memoryview(np.zeros(nbytes, np.uint8))  # type: ignore[arg-type]
    common = min(len(data), nbytes)
    whole[:common] = data[:common]
    return whole
