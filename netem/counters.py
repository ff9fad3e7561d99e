"""What crossed each link, counted where it was written and read.

`payload_bytes` are those of the buffers given to `Endpoint.send`; `wire_bytes` are all frames: headers, tags,
acknowledgements and resends too, but not TCP/IP and ZMTP, which a real network would add (about 3 %).
Totals only ever rise: rates are differences, taken by whoever reports them.
"""

from __future__ import annotations

import msgspec


class LinkCounters(msgspec.Struct):
    """Totals for one peer. The sent side first, then the received side (`received_*`, `dropped`, `duplicates`)."""

    payload_bytes: int = 0
    wire_bytes: int = 0
    messages: int = 0
    """Messages whose last segment has been written."""
    segments: int = 0
    """Frames written: data, acknowledgements and resends."""
    resent_bytes: int = 0
    """The part of `wire_bytes` that was sent before (a lost connection, or an acknowledgement that took too long)."""
    lateness_s: float = 0.0
    """Sum over `segments` of the time by which each was written after its emulated arrival; see `mean_lateness_s`."""
    lateness_max_s: float = 0.0
    promised_s: float = 0.0
    """Sum over bulk messages on a link with a rate, of the time from `send` to the last byte's arrival, as emulated."""
    missed_s: float = 0.0
    """Sum of the times by which those came later than that, because this host was late; see `note_transfer`."""
    received_payload_bytes: int = 0
    received_wire_bytes: int = 0
    received_messages: int = 0
    dropped: int = 0
    """Messages of an older generation or not admitted, and frames that were damaged or of another run."""
    duplicates: int = 0
    """Segments that had arrived before, or came after a gap; their sender repeats what is needed."""

    def add(self, other: LinkCounters) -> None:
        """Take in another link's totals."""
        late_s = max(self.lateness_max_s, other.lateness_max_s)
        for field in self.__struct_fields__:
            setattr(self, field, getattr(self, field) + getattr(other, field))
        self.lateness_max_s = late_s

    def note_transfer(self, took_s: float, late_s: float, stalled_s: float) -> None:
        """A message's last segment was written `late_s` after its emulated arrival, `took_s` after it was sent;
        `stalled_s` of that the link idled because this host was slow to give credit."""
        missed_s = late_s + stalled_s
        self.promised_s += took_s - missed_s
        self.missed_s += missed_s

    @property
    def mean_lateness_s(self) -> float:
        return self.lateness_s / self.segments if self.segments else 0.0
