"""Reliable, in-order delivery between two endpoints over a wire that may lose, repeat and reorder: no I/O, no clock.

ZeroMQ delivers at most once and counts messages, not bytes; so sequence numbers, cumulative acknowledgement, resend
and credit are here. The sender half has at most `window_bytes` unacknowledged, which bounds memory at both ends and in
between. After a timeout without progress it sends the oldest segment alone, as a probe. Once the probe is acknowledged,
all segments behind it are sent again. So a dead peer costs one segment per timeout. The receiver half takes segments in
order and drops all others.

Acknowledgements ride on data: every header has one. A frame without data is needed only where no data goes the other
way for `ack_delay_s`, and at once where half of the peer's window has come since the last acknowledgement. So a peer
without credit never waits for that delay, if no segment is larger than half a window: had less than half of the window
come, the peer would still have credit.

Lives: a header has the `incarnation` of its sender, and in `heard` that of its receiver, as far as the sender has heard
of it. A restarted process is a new life: both directions start over at 0, and frames for an earlier life are dropped.
Read `netem.lane` next, which asks a link what may be sent; `netem.engine` passes in the frames that arrive.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum, auto
from typing import NamedTuple

from netem.frames import STAMP_BYTES, VERSION, Header, Kind, encode_fields
from netem.segments import Segment


class Verdict(Enum):
    """What to do with a received frame's payload."""

    NEXT = auto()  # it is the next in order: check it, then `accept` it
    REPEATED = auto()  # it had arrived before, and is acknowledged again
    EARLY = auto()  # a segment before it is missing; the sender will repeat it
    FOREIGN = auto()  # it comes from an earlier life of the peer, or is meant for another life of this endpoint
    ACK = auto()  # no payload


class Silence(Enum):
    """The result of a link's timer."""

    NONE = auto()
    RESEND = auto()  # the oldest segment is to be sent again
    DEAD = auto()  # the peer owes an acknowledgement and has not been heard for too long; returned once


class Terms(NamedTuple):
    """The sizes and times of a link."""

    window_bytes: int
    """The most bytes to the peer that are not acknowledged."""
    peer_window_bytes: int
    """The same for bytes from the peer."""
    resend_s: float
    """How long an acknowledgement may take until segments are sent again."""
    silent_s: float
    """How long a peer that owes an acknowledgement may be silent."""
    ack_delay_s: float
    """How long an acknowledgement to the peer waits for data that carries it. It waits up to twice as long while there
    is such data, and other links of the NIC have their turns first."""


class Link:
    """Both directions between this endpoint and one peer. Times are seconds on the caller's clock."""

    def __init__(self, run_id: str, incarnation: int, terms: Terms) -> None:
        assert incarnation > 0
        self.incarnation = incarnation
        self.peer_incarnation = 0
        self.resize(terms)
        self._run_id = run_id
        self._confirmed = False  # the peer has shown that it has heard of this life
        # Receiver half.
        self._expected = 0
        self._owed_bytes = 0
        self.ack_due = math.inf  # when an acknowledgement is to be sent if there is no data to carry it
        self.ack_overdue = math.inf  # when it is to be sent in any case
        # Sender half.
        self.in_flight_bytes = 0
        self.stuck_since: float | None = None  # since when a message cannot leave, because the link is cut
        self.ready_at = -math.inf  # when credit last returned after it had run out
        self.released: list[Segment] = []
        """Segments acknowledged since the caller last emptied this list."""
        self._unacked: deque[Segment] = deque()
        self._next = 0
        self._waiting_for_credit = False
        self._resend_index = 0  # the place in `_unacked` of the next segment to repeat
        self._repeating = False
        self._probing = False
        self._backoff = 1.0
        self._progress_at = -math.inf
        self._heard_at = -math.inf
        self._reported = False

    def resize(self, terms: Terms) -> None:
        """Take other sizes and times from now on. For a while, more than the window may be in flight."""
        self.window_bytes, self.peer_window_bytes, self._resend_s, self._silent_s, self._ack_delay_s = terms
        self._urgent_bytes = self.window_bytes + self.window_bytes // 8  # room that bulk cannot use up

    # ── Sender half ──────────────────────────────────────────────────────────────────────────────────────────────

    def has_credit(self, nbytes: int, urgent: bool) -> bool:
        """Whether a new segment may be sent now. One may always be sent when nothing is in flight."""
        limit = self._urgent_bytes if urgent else self.window_bytes
        if not self._unacked or (self.in_flight_bytes + nbytes <= limit and not self._probing):
            return True
        self._waiting_for_credit = True
        return False

    @property
    def must_repeat(self) -> bool:
        """Whether a segment is to be sent again before any new one."""
        return self._repeating and not (self._probing and self._resend_index)

    def stamp(self, segment: Segment) -> None:
        """Number a new segment and write its header, which carries the acknowledgement owed to the peer."""
        segment.sequence = self._next
        self._next += 1
        self._unacked.append(segment)
        self.in_flight_bytes += segment.nbytes
        self._write_header(segment)

    def repeat(self) -> Segment:
        """The segment to be sent again now, with a new header. Only while `must_repeat` is true."""
        segment = self._unacked[self._resend_index]
        self._resend_index += 1
        if self._resend_index == len(self._unacked):
            self._repeating = False
        segment.resent = True
        self._write_header(segment)
        return segment

    def acknowledgement(self) -> Segment:
        """A frame without payload that carries an acknowledgement."""
        segment = Segment(None, 0, b"", 0, last=False)
        segment.header = encode_fields(
            VERSION, self._run_id, int(Kind.ACK), 0, self.incarnation, self.peer_incarnation, self._next, self._expected
        )
        segment.wire_bytes = len(segment.header) + STAMP_BYTES
        self._acknowledged()
        return segment

    def written(self, segment: Segment, now: float) -> None:
        """The segment is on the wire: its acknowledgement is awaited from now on."""
        if segment.written_at is None:
            segment.written_at = now

    def stick(self, since: float) -> None:
        """A message cannot leave, yet silence of the peer counts as if it had, until `stuck_since` is None again."""
        if self.stuck_since is None:
            self.stuck_since = since

    def check(self, now: float) -> Silence:
        """The timer. Call it now and then while messages are unacknowledged; a coarse tick is enough."""
        waiting_since = self._waiting_since()
        owed_since = min((at for at in (waiting_since, self.stuck_since) if at is not None), default=now)
        if now - max(owed_since, self._heard_at) >= self._silent_s and not self._reported:
            self._reported = True
            return Silence.DEAD
        if waiting_since is None:
            return Silence.NONE
        since = max(waiting_since, self._progress_at)
        if self.must_repeat or now - since < self._resend_s * self._backoff:
            return Silence.NONE
        self._backoff = min(self._backoff * 2, 32)
        self._progress_at = now
        self._repeating = self._probing = True
        self._resend_index = 0
        return Silence.RESEND

    def _waiting_since(self) -> float | None:
        """When the oldest unacknowledged segment was written; None if there is none or it has not been written."""
        return self._unacked[0].written_at if self._unacked else None

    def _write_header(self, segment: Segment) -> None:
        message = segment.message
        assert message is not None
        segment.header = encode_fields(
            VERSION,
            self._run_id,
            int(Kind.DATA),
            message.generation,
            self.incarnation,
            self.peer_incarnation,
            segment.sequence,
            self._expected,
            message.ident,
            segment.offset,
            message.total_bytes,
            segment.checksum,
            b"" if segment.offset else message.tag,
        )
        segment.wire_bytes = len(segment.header) + STAMP_BYTES + segment.nbytes
        self._acknowledged()

    def _acknowledged(self) -> None:
        self.ack_due = self.ack_overdue = math.inf
        self._owed_bytes = 0

    # ── Receiver half ────────────────────────────────────────────────────────────────────────────────────────────

    def renewed(self, header: Header) -> bool:
        """Take the peer's life from a frame. True if the peer has restarted, and so lost all that was sent to it.

        The link has then started over. The caller drops unfinished incoming messages, and queues again the outgoing
        ones that were not acknowledged as a whole.
        """
        if header.incarnation <= self.peer_incarnation:
            return False
        reborn = self.peer_incarnation > 0
        self.peer_incarnation = header.incarnation
        self._confirmed = False
        self._expected = 0
        self._acknowledged()
        if reborn:
            self.restart()
        return reborn

    def restart(self) -> None:
        """Forget all segments sent; numbering starts at 0 again."""
        self._unacked.clear()
        self.in_flight_bytes = self._next = self._resend_index = 0
        self._repeating = self._probing = False
        self._backoff = 1.0
        self._reported = False

    def receive(self, header: Header, now: float) -> Verdict:
        """Take a frame's acknowledgement (see `released`), and say what to do with its payload."""
        if header.incarnation != self.peer_incarnation:
            return Verdict.FOREIGN
        self._heard_at = now
        if header.heard == self.incarnation:
            self._confirmed = True
            self._acknowledge(header.ack, now)
        elif header.heard or self._confirmed:
            self._owe(now, 0.0)  # tells the peer the number of this life
            return Verdict.FOREIGN
        if header.kind is Kind.ACK:
            return Verdict.ACK
        if header.sequence == self._expected:
            return Verdict.NEXT
        self._owe(now, self._ack_delay_s)
        return Verdict.REPEATED if header.sequence < self._expected else Verdict.EARLY

    def accept(self, nbytes: int, now: float) -> None:
        """The payload with the verdict `NEXT` was intact: its acknowledgement is owed."""
        self._expected += 1
        self._owed_bytes += nbytes
        self._owe(now, 0.0 if self._owed_bytes * 2 >= self.peer_window_bytes else self._ack_delay_s)

    def _owe(self, now: float, delay_s: float) -> None:
        if now + delay_s < self.ack_due:
            self.ack_due = now + delay_s
        if now + 2 * delay_s < self.ack_overdue:
            self.ack_overdue = now + 2 * delay_s

    def _acknowledge(self, ack: int, now: float) -> None:
        unacked = self._unacked
        if not unacked or ack <= unacked[0].sequence or ack > self._next:
            return
        # If the probe was missing, so are the segments behind it. If more than the probe is acknowledged, they had
        # arrived, and the timeout came too soon.
        lost = self._probing and self._resend_index > 0 and ack == unacked[0].sequence + 1
        while unacked and unacked[0].sequence < ack:
            segment = unacked.popleft()
            self.in_flight_bytes -= segment.nbytes
            self.released.append(segment)
            if self._resend_index:
                self._resend_index -= 1
        self._repeating = (lost or (self._repeating and not self._probing)) and self._resend_index < len(unacked)
        self._probing = self._reported = False
        self._backoff = 1.0
        self._progress_at = now
        if self._waiting_for_credit:
            self._waiting_for_credit = False
            self.ready_at = now
