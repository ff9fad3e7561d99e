"""The traffic of each link, counted where frames are written and read.

`payload_bytes` counts the buffers given to `Endpoint.send`. `wire_bytes` counts all frames, with headers, tags,
acknowledgements and resends, but without TCP/IP and ZMTP, which a real network would add (about 3 %). CURVE belongs to
ZMTP: it adds 66 bytes to a frame, and neither the totals nor the emulated rates count them, so that a run has the same
bytes and times with encryption and without. Totals only rise; a report takes differences to get rates.
"""

from __future__ import annotations

import msgspec


class LinkCounters(msgspec.Struct):
    """Totals for one peer: first what was sent, then what was received (`received_*`, `dropped`, `duplicates`)."""

    payload_bytes: int = 0
    wire_bytes: int = 0
    messages: int = 0
    """Messages whose last segment has been written."""
    segments: int = 0
    """Frames written: data, acknowledgements and resends."""
    resent_bytes: int = 0
    """The part of `wire_bytes` that was sent again, after a lost connection or a late acknowledgement."""
    lateness_s: float = 0.0
    """Sum over `segments` of the time between emulated arrival and writing; see `mean_lateness_s`."""
    lateness_max_s: float = 0.0
    promised_s: float = 0.0
    """Sum over bulk messages on links with a rate: the emulated time from `send` to the arrival of the last byte."""
    missed_s: float = 0.0
    """Sum of the times by which those messages arrived later, because this host was late; see `note_transfer`."""
    received_payload_bytes: int = 0
    received_wire_bytes: int = 0
    received_messages: int = 0
    dropped: int = 0
    """Messages that were of an older generation or not admitted, and frames that were damaged or of another run."""
    duplicates: int = 0
    """Segments that had arrived before, or that came after a gap; the sender repeats those that are missing."""

    def add(self, other: LinkCounters) -> None:
        """Add another link's totals to these."""
        late_s = max(self.lateness_max_s, other.lateness_max_s)
        for field in self.__struct_fields__:
            setattr(self, field, getattr(self, field) + getattr(other, field))
        self.lateness_max_s = late_s

    def note_transfer(self, took_s: float, late_s: float, stalled_s: float) -> None:
        """Count one message: its last segment was written `took_s` after `send`, and `late_s` after its emulated
        arrival. For `stalled_s` of that time the link was idle because this host gave credit late."""
        missed_s = late_s + stalled_s
        self.promised_s += took_s - missed_s
        self.missed_s += missed_s

    @property
    def mean_lateness_s(self) -> float:
        return self.lateness_s / self.segments if self.segments else 0.0
