"""A node's side: it hands its files in at the coordinator, below the priority of training, and fetches those it lacks.

A piece leaves when no bulk of training waits to be acknowledged, so that it uses the line while the node computes. On a
line that is never idle, one leaves every `PATIENCE_S` all the same, or a checkpoint would never be whole.

`hand_in` belongs to the thread that writes checkpoints, `fetch` to the trainer's, `admit` and `deliver` to the I/O
thread. Every wait has a limit.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from coordinator.files.depot import Depot
from coordinator.files.messages import (
    Fetch,
    FileMessage,
    Offer,
    Piece,
    Taken,
    Want,
    file_tag,
    read_file_tag,
)
from coordinator.files.taking import LIMIT_S, RETRY_S, Taking
from coordinator.messages import COORDINATOR
from netem.errors import IsthmusError

log = logging.getLogger("isthmus.checkpoint")

UNDER_WAY = 8
"""Messages of any kind that may wait for an acknowledgement when a piece leaves."""
PATIENCE_S = 0.1
_LOOK_S = 0.002
_POLL_S = 0.25


class Line(Protocol):
    """The part of `netem.endpoint.Endpoint` that is used here."""

    def send(self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, urgent: bool = False) -> None: ...

    def is_idle(self, most_messages: int) -> bool: ...


class _Arrival(NamedTuple):
    message: FileMessage
    data: memoryview


class Courier:
    """The files of one node, in `depot`. `raise_if_over` ends waits where the run or the generation is over."""

    def __init__(self, line: Line, depot: Depot, raise_if_over: Callable[[], None]) -> None:
        self._line = line
        self._depot = depot
        self._raise_if_over = raise_if_over
        self._fetched: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._fetching: tuple[int, str] | None = None

    def hand_in(self, step: int, names: Sequence[str]) -> None:
        """Give the coordinator these files of the checkpoint after `step` steps, unless it sees them on its own disk.

        Raises `IsthmusError` where it does not take one.
        """
        for name in names:
            try:
                sent_bytes = self._hand_in(step, name)
            except OSError as error:
                raise IsthmusError(f"{name}: cannot be read: {error.strerror}") from None
            if sent_bytes:
                log.info("the coordinator has %s after step %d (%d bytes were sent)", name, step, sent_bytes)

    def fetch(self, step: int, name: str) -> bool:
        """Get a file of the checkpoint after `step` steps from the coordinator, unless it is here; whether it is here
        then. Raises as `raise_if_over` does, and `IsthmusError` where the file stops coming."""
        if self._depot.path(Fetch(step, name)).exists():
            return True
        self._fetching = (step, name)
        try:
            return self._fetch(Fetch(step, name))
        except OSError as error:
            raise IsthmusError(f"{name}: cannot be written: {error.strerror}") from None
        finally:
            self._fetching = None

    # The I/O thread.

    def admit(self, tag: bytes, total_bytes: int) -> memoryview | None:
        """Room for what the coordinator says about files. Raises `ProtocolError` for what it may not say."""
        read_file_tag(tag, total_bytes, COORDINATOR)
        return memoryview(np.empty(total_bytes, np.uint8))  # type: ignore[arg-type]

    def deliver(self, tag: bytes, buffer: memoryview) -> None:
        """The coordinator says something about a file."""
        message = read_file_tag(tag, len(buffer), COORDINATOR)
        of_fetch = isinstance(message, Offer | Piece) or (isinstance(message, Taken) and message.key == self._fetching)
        (self._fetched if of_fetch else self._asked).put(_Arrival(message, buffer))

    # Inside.

    def _hand_in(self, step: int, name: str) -> int:
        offer = self._depot.offer(Fetch(step, name))
        if offer is None:
            raise IsthmusError(f"{name} of step {step} is gone before it was handed in")
        sent_bytes, heard_s, offered_s = 0, time.monotonic(), time.monotonic()
        self._say(offer)
        while True:
            now_s = time.monotonic()
            if now_s - heard_s > LIMIT_S:
                raise IsthmusError(f"the coordinator does not take {name}: no word for {LIMIT_S:g} s")
            if now_s - max(heard_s, offered_s) > RETRY_S:
                offered_s = now_s
                self._say(offer)
            try:
                message = self._asked.get(timeout=_POLL_S).message
            except queue.Empty:
                continue
            if message.key != offer.key:
                continue
            heard_s = time.monotonic()
            if isinstance(message, Taken):
                if message.reason:
                    raise IsthmusError(f"{name} was not collected: {message.reason}")
                return sent_bytes
            if isinstance(message, Want):
                self._await_gap()
                piece = self._depot.read(offer, message.offset)
                self._say(Piece(*offer.key, message.offset), piece)
                sent_bytes += len(piece)

    def _fetch(self, wanted: Fetch) -> bool:
        while not self._fetched.empty():
            self._fetched.get()  # left from before
        taking: Taking | None = None
        heard_s = asked_s = time.monotonic()
        self._say(wanted)
        while taking is None or not taking.done:
            self._raise_if_over()
            now_s = time.monotonic()
            if now_s - heard_s > LIMIT_S:
                raise IsthmusError(f"the coordinator does not send {wanted.name}: no word for {LIMIT_S:g} s")
            if taking is None and now_s - asked_s > RETRY_S:
                asked_s = now_s
                self._say(wanted)
            for offset in taking.wants(now_s) if taking else ():
                self._say(Want(*wanted.key, offset))
            try:
                message, data = self._fetched.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if message.key != wanted.key:
                continue
            heard_s = time.monotonic()
            if isinstance(message, Taken):
                return False
            if isinstance(message, Offer) and taking is None:
                if reason := self._depot.begin(message):
                    raise IsthmusError(f"{wanted.name}: {reason}")
                taking = Taking(message, heard_s)
            elif isinstance(message, Piece) and taking and taking.arrived(message.offset, len(data), heard_s):
                self._depot.write(wanted, message.offset, data)
        self._depot.finish(wanted)
        log.info("got %s after step %d from the coordinator", wanted.name, wanted.step)
        return True

    def _await_gap(self) -> None:
        """Wait until training uses the line no more, at most for a moment."""
        until_s = time.monotonic() + PATIENCE_S
        while not self._line.is_idle(UNDER_WAY) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)

    def _say(self, message: FileMessage, data: bytes = b"") -> None:
        self._line.send(COORDINATOR, file_tag(message), [memoryview(data)] if data else [], urgent=True)
