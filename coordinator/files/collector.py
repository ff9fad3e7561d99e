"""The coordinator's side: it takes the files that members offer, and gives members those that they ask for.

A file that is here already, because the member writes to the same disk, is not sent. The server calls this for members
only, on its own thread; a disk that fails costs the file, and not the run.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from coordinator.files.depot import Depot
from coordinator.files.messages import About, Fetch, FileMessage, Offer, Piece, Taken, Want
from coordinator.files.taking import Taking
from netem.names import plain

log = logging.getLogger("isthmus.coordinator")

MOST_OF_A_PEER = 4
"""Files that one member sends at once, at most. It sends one after another."""
TICK_S = 1.0


class Reply(NamedTuple):
    """What is sent to a member."""

    peer: str
    message: FileMessage
    data: bytes = b""


class Collector:
    """The files of one run of `steps` steps."""

    def __init__(self, depot: Depot, steps: int) -> None:
        self._depot = depot
        self._steps = steps
        self._takings: dict[tuple[str, int, str], Taking] = {}
        self._ticked_s = 0.0

    def receive(self, peer: str, message: FileMessage, data: memoryview, now_s: float) -> list[Reply]:
        """A member says something about a file."""
        try:
            match message:
                case Offer():
                    return self._offered(peer, message, now_s)
                case Piece():
                    return self._arrived(peer, message, data, now_s)
                case Want():
                    piece = self._depot.read(message, message.offset)
                    return [Reply(peer, Piece(*message.key, message.offset), piece)] if piece else []
                case Fetch():
                    offer = self._depot.offer(message)
                    return [Reply(peer, offer or Taken(*message.key, "the coordinator does not have it"))]
                case Taken():
                    return []
        except OSError as error:
            self._takings.pop((peer, *message.key), None)
            return [self._refusal(peer, message, f"the coordinator's disk: {error.strerror}")]

    def tick(self, now_s: float) -> list[Reply]:
        """Let time pass: ask again for what has not come."""
        if now_s - self._ticked_s < TICK_S:
            return []
        self._ticked_s = now_s
        for key, taking in list(self._takings.items()):
            if taking.is_late(now_s):
                self._drop(key)
        return [reply for key, taking in self._takings.items() for reply in _wants(key[0], taking, now_s)]

    def lose(self, peer: str) -> None:
        """A member is gone: the rest of its files will not come."""
        for key in [key for key in self._takings if key[0] == peer]:
            self._drop(key)

    def _offered(self, peer: str, offer: Offer, now_s: float) -> list[Reply]:
        if (peer, *offer.key) in self._takings:
            return []  # it said so again, because pieces were late
        if offer.step > self._steps:
            return [self._refusal(peer, offer, f"the run has {self._steps} steps")]
        if self._depot.has(offer):
            return [Reply(peer, Taken(*offer.key))]
        if sum(key[0] == peer for key in self._takings) >= MOST_OF_A_PEER:
            return [self._refusal(peer, offer, "too many files at once")]
        if reason := self._depot.begin(offer):
            return [self._refusal(peer, offer, reason)]
        taking = self._takings[(peer, *offer.key)] = Taking(offer, now_s)
        return _wants(peer, taking, now_s)

    def _arrived(self, peer: str, piece: Piece, data: memoryview, now_s: float) -> list[Reply]:
        key = (peer, *piece.key)
        taking = self._takings.get(key)
        if taking is None or not taking.arrived(piece.offset, len(data), now_s):
            return []
        self._depot.write(piece, piece.offset, data)
        if not taking.done:
            return _wants(peer, taking, now_s)
        self._depot.finish(piece)
        del self._takings[key]
        return [Reply(peer, Taken(*piece.key))]

    def _refusal(self, peer: str, file: About, reason: str) -> Reply:
        log.warning("%s of %s after step %d is not collected: %s", file.name, plain(peer), file.step, reason)
        return Reply(peer, Taken(*file.key, reason[:100]))

    def _drop(self, key: tuple[str, int, str]) -> None:
        taking = self._takings.pop(key)
        try:
            self._depot.drop(taking.offer)
        except OSError as error:
            log.warning("%s: %s", self._depot.path(taking.offer), error.strerror)


def _wants(peer: str, taking: Taking, now_s: float) -> list[Reply]:
    return [Reply(peer, Want(*taking.offer.key, offset)) for offset in taking.wants(now_s)]
