"""Payloads that arrive in pieces (`node.exchange.routes`): their memory, what is checked of a piece, and which pieces
this node owes to others. The inbox calls this under its lock."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from netem.errors import ProtocolError
from node.exchange.routes import Routes, span_of
from node.exchange.tags import ChunkTag, Piece


class Owed(NamedTuple):
    """A piece that this node owes to `ranks`: its tag, and the message as it came."""

    ranks: tuple[int, ...]
    named: ChunkTag
    tag: bytes
    buffer: memoryview


PassOn = Callable[[Owed], None]


@dataclass
class _Partial:
    buffer: memoryview
    missing: set[int]


class Pieces:
    """The payloads of which some pieces have come or are coming, by key, and the pieces that are owed to others."""

    def __init__(self) -> None:
        self._partial: dict[Hashable, _Partial] = {}
        self._owed: list[Owed] = []
        self._pass_on: PassOn | None = None

    def clear(self) -> None:
        """A generation begins. Until `pass_through` says how, pieces are not passed on, but kept."""
        self._partial.clear()
        self._owed.clear()
        self._pass_on = None

    def pass_through(self, pass_on: PassOn) -> list[Owed]:
        """Pieces are passed on with this from now on; those that are owed already."""
        self._pass_on = pass_on
        owed, self._owed = self._owed, []
        return owed

    def room(self, payload: Hashable, piece: Piece, nbytes: int) -> memoryview:
        """The piece's place in its payload of `nbytes` bytes, for which there is memory from the first piece on."""
        if payload not in self._partial:
            self._partial[payload] = _Partial(room(nbytes), set(range(piece.of)))
        buffer = self._partial[payload].buffer
        begin, end = span_of(piece.number, piece.of, nbytes)
        return buffer[begin:end]

    def came(self, payload: Hashable, number: int) -> memoryview | None:
        """A piece has come: the whole payload, where it was the last one."""
        partial = self._partial[payload]
        partial.missing.remove(number)
        return None if partial.missing else self._partial.pop(payload).buffer

    def missing(self, payload: Hashable) -> tuple[int, int] | None:
        """(the first piece that has not come, bytes of the payload), where others have come or are coming."""
        partial = self._partial.get(payload)
        return None if partial is None else (min(partial.missing), len(partial.buffer))

    def drop(self, payload: Hashable) -> None:
        """Nobody asks for this payload any more."""
        self._partial.pop(payload, None)

    def owe(self, owed: Owed) -> PassOn | None:
        """How to pass this piece on now; None where it is owed to nobody, or is kept until there is a way."""
        if self._pass_on is None and owed.ranks:
            self._owed.append(owed)
        return self._pass_on if owed.ranks else None


def room(nbytes: int) -> memoryview:
    """Memory for a message."""
    return memoryview(np.empty(nbytes, np.uint8))  # type: ignore[arg-type]


def message_bytes(tag: ChunkTag, routes: Routes, nbytes: int, me: int, sender: int, peer: str) -> int:
    """The bytes of a message to `me` about a payload of `nbytes` bytes: of all of it, or of a piece. Raises
    `ProtocolError` where the payload does not come like this, or not from this sender, who is called `peer`."""
    relayed = tag.kind == "kv" and routes.relays(tag.chunk)
    pieces = routes.pieces(tag.chunk) if relayed else 0
    if (tag.piece.of if tag.piece else 0) != pieces:
        expected = f"{pieces} pieces" if pieces else "one message"
        sent = f"{tag.piece.of} pieces" if tag.piece else "one message"
        raise ProtocolError(f"sent {tag.kind} of chunk {tag.chunk} in {sent}, expected {expected}", peer=peer)
    if tag.piece is None:
        return nbytes
    if tag.piece.number >= pieces or routes.source(me, tag.chunk, tag.piece.number) != sender:
        what = f"piece {tag.piece.number} of chunk {tag.chunk}"
        raise ProtocolError(f"sent {what}, which it does not owe this node", peer=peer)
    begin, end = span_of(tag.piece.number, pieces, nbytes)
    return end - begin


def check_bytes(tag: ChunkTag, buffer: memoryview, peer: str) -> None:
    """Raise `ProtocolError` where the bytes of a piece that `peer` sent are not those that its owner sent."""
    if tag.piece is not None and zlib.crc32(buffer) != tag.piece.checksum:
        raise ProtocolError(
            f"piece {tag.piece.number} of chunk {tag.chunk}, layer {tag.layer} is not what the chunk's owner sent",
            peer=peer,
        )
