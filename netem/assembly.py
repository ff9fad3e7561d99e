"""Messages put together again from segments that arrive in order, in buffers of the upper floor.

The upper floor sees the tag before anything is allocated. It answers with a buffer, with None (not wanted), or with a
`ProtocolError`. Messages of an older generation are dropped before that. Generation 0 stands apart from all memberships
(rendezvous, the coordinator), and is never too old. Each peer has an `Assembler`; `netem.link` has put the segments in
order.
"""

from __future__ import annotations

from typing import Protocol

from netem.errors import IsthmusError, ProtocolError
from netem.frames import Header
from netem.limits import Limits


class Receiver(Protocol):
    """What the I/O thread calls in the upper floor. No method may block."""

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        """A message begins. Validate `tag`, then return a writable buffer of `total_bytes`, or None to drop it.

        Raise `ProtocolError` for an invalid tag: the error is passed to `failed`, and the message is dropped. A message
        without payload needs a buffer of 0 bytes.
        """

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        """The message is complete in the buffer from `admit`. Each one sent comes once, in the order of its flow.

        After a peer was restarted or forgotten, messages that were not acknowledged as a whole are delivered again.
        """

    def failed(self, error: IsthmusError) -> None:
        """A peer broke the protocol or fell silent, or the I/O thread failed. The endpoint goes on if it can."""


class _Open:
    """An unfinished message. Without a buffer, its segments are skipped."""

    __slots__ = ("buffer", "filled", "generation", "tag", "total_bytes")

    def __init__(self, header: Header) -> None:
        self.buffer: memoryview | None = None
        self.filled = 0
        self.generation = header.generation
        self.tag = header.tag
        self.total_bytes = header.total_bytes


class Assembler:
    """The unfinished messages of one peer."""

    def __init__(self, peer: str, receiver: Receiver, limits: Limits) -> None:
        self._peer = peer
        self._receiver = receiver
        self._limits = limits
        self._open: dict[int, _Open] = {}
        self._newest = 0  # newest generation of which the peer has begun a message
        self._dropped = 0

    def reset(self) -> None:
        """The peer has restarted: it will send its unfinished messages again."""
        self._open.clear()
        self._newest = 0

    def retire(self, generation: int) -> None:
        """Drop the unfinished messages of generations before `generation`, except those of generation 0."""
        for ident, message in list(self._open.items()):
            if 0 < message.generation < generation:
                del self._open[ident]
                self._dropped += message.buffer is not None

    def take_dropped(self) -> int:
        """How many messages were dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def add(self, header: Header, payload: memoryview, generation: int) -> bool:
        """Take the next segment; True if it was the last one and its message has been delivered.

        `generation` is this endpoint's own. Raises `ProtocolError` once for an invalid message.
        """
        if 0 < header.generation < max(generation, self._newest):
            self._dropped += header.offset == 0
            return False
        if header.generation > self._newest:
            self._newest = header.generation
            self.retire(header.generation)  # its sender has dropped the rest of the older ones
        message = self._begin(header) if header.offset == 0 else self._continue(header)
        start, message.filled = message.filled, message.filled + payload.nbytes
        if message.filled == message.total_bytes:
            del self._open[header.message]
        if header.offset == 0:
            message.buffer = self._lend(header)
        if message.buffer is None:
            return False
        if payload.nbytes:
            message.buffer[start : message.filled] = payload
        if message.filled < message.total_bytes:
            return False
        self._receiver.deliver(self._peer, message.generation, message.tag, message.buffer)
        return True

    def _begin(self, header: Header) -> _Open:
        if header.message in self._open:
            raise self._nonsense(header, f"message {header.message} begins twice")
        if len(self._open) >= self._limits.max_open_messages:
            raise self._nonsense(header, f"more than {self._limits.max_open_messages} messages begun and not finished")
        message = self._open[header.message] = _Open(header)
        return message

    def _lend(self, header: Header) -> memoryview | None:
        """The buffer for a new message. Without one, the rest of the message is skipped."""
        self._dropped += 1  # taken back below, once the message has a buffer
        limit = self._limits.max_message_bytes
        if header.total_bytes > limit:
            raise self._nonsense(header, f"a message of {header.total_bytes} bytes, at most {limit} are allowed")
        buffer = self._receiver.admit(self._peer, header.generation, header.tag, header.total_bytes)
        if buffer is None:
            return None
        assert buffer.nbytes == header.total_bytes, "admit() lends a buffer of exactly total_bytes"
        self._dropped -= 1
        return buffer.cast("B") if buffer.nbytes else buffer

    def _continue(self, header: Header) -> _Open:
        message = self._open.get(header.message)
        if message is None:
            raise self._nonsense(header, f"message {header.message} goes on without a beginning")
        if header.offset != message.filled or header.total_bytes != message.total_bytes:
            del self._open[header.message]
            raise self._nonsense(header, f"message {header.message} goes on at the wrong byte")
        return message

    def _nonsense(self, header: Header, what: str) -> ProtocolError:
        return ProtocolError(what, peer=self._peer, generation=header.generation)
