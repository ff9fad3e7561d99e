"""The caps and deadlines of an endpoint: what bounds its memory and its patience.

They are properties of the program, not of the emulated network (that is `netem.profile`).
"""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * KIB

COPY_BYTES = 64 * KIB
"""ZeroMQ's zero-copy bookkeeping pays only above this; smaller payloads are copied."""

MAX_SEGMENT_BYTES = MIB
"""No frame is larger: a larger one on a slow link starves heartbeats and is cut off by libzmq."""

MAX_NAME_BYTES = 128


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds. The defaults suit a run; tests shorten them."""

    max_queued_bytes: int = 1024 * MIB
    """Bytes accepted by `send` and not yet acknowledged, over all peers: references, not copies. Urgent messages are
    beside this, and a single message may exceed it."""
    max_message_bytes: int = 2 * 1024 * MIB
    """One message's payload, announced by its first segment: larger is refused before anything is allocated."""
    max_tag_bytes: int = 256 * KIB
    max_open_messages: int = 256
    """Messages that one peer may have begun and not finished."""
    max_strangers: int = 256
    """Peers that were heard, and neither dialled nor trusted. A new one takes the place of the one longest unheard;
    with 0, nobody is heard that was not dialled."""
    silent_s: float = 30.0
    """A peer that owes an acknowledgement and has not been heard for so long, beside the link's own round trip, is
    reported as failed."""
    resend_s: float = 1.0
    """Slack on top of the link's own round trip before unacknowledged segments are sent again."""
    ack_delay_s: float = 0.01
    """How long an acknowledgement waits for a data segment to ride on."""
