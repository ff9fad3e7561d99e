"""An outgoing message, and the segments that it is cut into.

A message is a tag and some buffers, which are sent as if they were one. A segment is a copy only if it spans two
buffers. `netem.lane` decides which message is cut next; `netem.link` numbers and repeats segments.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

Payload = memoryview | bytes


class Message:
    """One call of `send`: `total_bytes` over all `views`, of which `cut_bytes` are in segments already."""

    __slots__ = (
        "_index", "_offset", "attempts", "cut_bytes", "flow", "generation", "ident", "queued_at", "stalled_before_s",
        "tag", "total_bytes", "urgent", "views",
    )  # fmt: skip

    def __init__(
        self,
        tag: bytes,
        views: Sequence[memoryview],
        *,
        generation: int = 0,
        urgent: bool = False,
        flow: int = 0,
        queued_at: float = 0.0,
    ) -> None:
        self.tag = tag
        self.views = [view for view in views if view.nbytes]
        self.generation = generation
        self.urgent = urgent
        self.flow = flow
        self.queued_at = queued_at
        self.total_bytes = sum(view.nbytes for view in self.views)
        self.ident = -1  # set by the lane that queues it
        self.stalled_before_s = 0.0  # the lane's `stalled_s` at that time
        self.attempts = 0
        self.rewind()

    def rewind(self) -> None:
        """Start over: the peer process that received the first part has gone."""
        self.cut_bytes = 0
        self._index = 0  # the view in which the next segment starts
        self._offset = 0  # the place in that view
        self.attempts += 1

    def next_bytes(self, segment_bytes: int) -> int:
        """Payload length of the next segment."""
        rest = self.total_bytes - self.cut_bytes
        return rest if rest < segment_bytes else segment_bytes

    def cut(self, segment_bytes: int) -> Segment:
        """The next segment. A message without payload has one segment of length 0."""
        nbytes = self.next_bytes(segment_bytes)
        offset = self.cut_bytes
        payload = self._take(nbytes)
        self.cut_bytes += nbytes
        return Segment(self, offset, payload, nbytes, last=self.cut_bytes == self.total_bytes)

    def _take(self, nbytes: int) -> Payload:
        parts: list[memoryview] = []
        while nbytes:
            view = self.views[self._index]
            part = view[self._offset : self._offset + nbytes]
            parts.append(part)
            nbytes -= part.nbytes
            self._offset += part.nbytes
            if self._offset == view.nbytes:
                self._index += 1
                self._offset = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Segment:
    """What one frame carries. An acknowledgement is a segment without a message."""

    __slots__ = (
        "_checksum",
        "header",
        "last",
        "message",
        "nbytes",
        "offset",
        "payload",
        "resent",
        "sequence",
        "wire_bytes",
        "written_at",
    )  # fmt: skip

    def __init__(self, message: Message | None, offset: int, payload: Payload, nbytes: int, *, last: bool) -> None:
        self.message = message
        self.offset = offset
        self.payload = payload
        self.nbytes = nbytes
        self.last = last
        self.resent = message is not None and message.attempts > 1
        self.sequence = -1
        self.header = b""
        self.wire_bytes = 0
        self.written_at: float | None = None
        self._checksum: int | None = None

    @property
    def checksum(self) -> int:
        """CRC-32 of the payload, computed once."""
        if self._checksum is None:
            self._checksum = zlib.crc32(self.payload)
        return self._checksum
