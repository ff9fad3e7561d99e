"""The caps and deadlines of an endpoint: they bound its memory and how long it waits.

They belong to the program, not to the emulated network (`netem.profile`).
"""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * KIB

COPY_BYTES = 64 * KIB
"""ZeroMQ's zero-copy bookkeeping pays only above this; smaller payloads are copied."""

MAX_SEGMENT_BYTES = MIB
"""The largest frame. On a slow link, a larger one would delay heartbeats until libzmq closes the connection."""

URGENT_SEGMENT_BYTES = 64 * KIB
"""The largest segment of an urgent message. A coordinator, which takes only those, refuses larger frames, so that
strangers cannot fill its memory with them."""

MAX_NAME_BYTES = 128


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds. The defaults suit a run; tests shorten them."""

    max_queued_bytes: int = 1024 * MIB
    """Bytes accepted by `send` and not yet acknowledged, over all peers: references, not copies. Urgent messages do
    not count, and a single message may exceed the limit."""
    max_message_bytes: int = 2 * 1024 * MIB
    """Payload of one message. Its first segment states the size; a larger message is refused before allocation."""
    max_tag_bytes: int = 256 * KIB
    max_open_messages: int = 256
    """Unfinished messages of one peer."""
    max_strangers: int = 256
    """Peers that have called this endpoint, and were neither dialled nor trusted. A new one replaces the one that has
    been silent for longest. With 0, only peers that were dialled are heard."""
    max_stranger_bytes: int | None = None
    """Bytes on the wire that one stranger may send as long as it is one. A frame beyond that is dropped, and the
    stranger's connection is closed. None is unlimited."""
    max_frame_bytes: int = MAX_SEGMENT_BYTES
    """A larger part of a frame is refused before it is read, and its connection is closed."""
    max_unread_frames: int = 64
    """Frames of one caller that may wait to be read; beyond that, TCP holds the caller back."""
    silent_s: float = 30.0
    """A peer that owes an acknowledgement is reported as failed when it has not been heard for this time plus the
    link's round trip."""
    resend_s: float = 1.0
    """Unacknowledged segments are sent again after this time plus the link's round trip."""
