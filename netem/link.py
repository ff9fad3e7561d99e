"""Reliable, in-order delivery between two endpoints over a wire that may lose, repeat and reorder: no I/O, no clock.

ZeroMQ delivers at most once and counts messages, not bytes; so sequence numbers, cumulative acknowledgement, resend
and credit are here. The sender half has at most `window_bytes` unacknowledged, which bounds the memory of everybody
on the way. After a timeout without progress it probes with the oldest segment alone, and goes back to all of the
rest once that one is acknowledged: a dead peer costs one segment a timeout. The receiver half takes segments in
order and drops the others.

Lives: a header says which `incarnation` of its sender speaks and which one of its receiver it has `heard`. A
process that returns is a new life: both directions start over at 0, and frames meant for a dead life are not taken.
Read `netem.lane` next: it asks a link what may go, and `netem.engine` tells it what came.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum, auto

from netem.frames import STAMP_BYTES, VERSION, Header, Kind, encode_fields
from netem.segments import Segment


class Verdict(Enum):
    """What to do with a received frame's payload."""

    NEXT = auto()  # it is the next in order: check it, then `accept` it
    REPEATED = auto()  # already there; acknowledged again
    EARLY = auto()  # something before it is missing; its sender will repeat it
    FOREIGN = auto()  # from, or meant for, a life that is over
    ACK = auto()  # no payload


class Silence(Enum):
    """What a link's timer found."""

    NONE = auto()
    RESEND = auto()  # the oldest segment is to be sent again
    DEAD = auto()  # the peer owes an acknowledgement and has not been heard for too long; said once


class Link:
    """Both directions between this endpoint and one peer. Times are seconds on the caller's clock."""

    def __init__(
        self,
        run_id: str,
        incarnation: int,
        *,
        window_bytes: int,
        resend_s: float,
        silent_s: float,
        ack_delay_s: float,
    ) -> None:
        assert incarnation > 0
        self.incarnation = incarnation
        self.peer_incarnation = 0
        self.resize(window_bytes, resend_s, silent_s)
        self._run_id = run_id
        self._ack_delay_s = ack_delay_s
        self._confirmed = False  # the peer has shown that it knows this life
        # Receiver half.
        self._expected = 0
        self._owed_bytes = 0
        self.ack_due = math.inf
        # Sender half.
        self.in_flight_bytes = 0
        self.stuck_since: float | None = None  # since when something cannot leave, because the link is cut
        self.ready_at = -math.inf  # since when credit has been there, where it had run out
        self.released: list[Segment] = []
        """Segments acknowledged since the caller last emptied this list."""
        self._unacked: deque[Segment] = deque()
        self._next = 0
        self._waiting_for_credit = False
        self._resend_index = 0  # where in `_unacked` the repetition stands; at its end, there is none
        self._repeating = False
        self._probing = False
        self._backoff = 1.0
        self._progress_at = -math.inf
        self._heard_at = -math.inf
        self._reported = False

    def resize(self, window_bytes: int, resend_s: float, silent_s: float) -> None:
        """Another window and other patience from now on; more may be in flight for a while."""
        self.window_bytes = window_bytes
        self._urgent_bytes = window_bytes + window_bytes // 8  # control never waits for credit held by bulk
        self._resend_s = resend_s
        self._silent_s = silent_s

    # ── Sender half ──────────────────────────────────────────────────────────────────────────────────────────────

    def has_credit(self, nbytes: int, urgent: bool) -> bool:
        """Whether a new segment may go now. One may always go when nothing is in flight."""
        limit = self._urgent_bytes if urgent else self.window_bytes
        if not self._unacked or (self.in_flight_bytes + nbytes <= limit and not self._probing):
            return True
        self._waiting_for_credit = True
        return False

    @property
    def must_repeat(self) -> bool:
        """Whether a repetition is to be sent before anything new."""
        return self._repeating and not (self._probing and self._resend_index)

    def stamp(self, segment: Segment) -> None:
        """Number a new segment and write its header, which carries the acknowledgement owed to the peer."""
        segment.sequence = self._next
        self._next += 1
        self._unacked.append(segment)
        self.in_flight_bytes += segment.nbytes
        self._write_header(segment)

    def repeat(self) -> Segment:
        """The segment to be sent again now, with a fresh header. Ask `must_repeat` first."""
        segment = self._unacked[self._resend_index]
        self._resend_index += 1
        if self._resend_index == len(self._unacked):
            self._repeating = False
        segment.resent = True
        self._write_header(segment)
        return segment

    def acknowledgement(self) -> Segment:
        """A frame that only acknowledges."""
        segment = Segment(None, 0, b"", 0, last=False)
        segment.header = encode_fields(
            VERSION, self._run_id, int(Kind.ACK), 0, self.incarnation, self.peer_incarnation, self._next, self._expected
        )
        segment.wire_bytes = len(segment.header) + STAMP_BYTES
        self._acknowledged()
        return segment

    def written(self, segment: Segment, now: float) -> None:
        """The segment is on the wire; from here on its acknowledgement is awaited."""
        if segment.written_at is None:
            segment.written_at = now

    def stick(self, since: float) -> None:
        """Something cannot leave, and the peer owes an answer to it all the same; until `stuck_since` is None again."""
        if self.stuck_since is None:
            self.stuck_since = since

    def check(self, now: float) -> Silence:
        """The timer: to be called now and then while messages are unacknowledged (a coarse tick will do)."""
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
        """Since when the oldest unacknowledged segment has been on the wire; None while there is none."""
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
        self.ack_due = math.inf
        self._owed_bytes = 0

    # ── Receiver half ────────────────────────────────────────────────────────────────────────────────────────────

    def renewed(self, header: Header) -> bool:
        """Learn the peer's life from a frame. True if it is a new one, to which nothing sent so far matters.

        The link has then started over; the caller drops what it had half received, and queues again what had not
        been acknowledged as a whole.
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
        """Forget everything sent; numbering starts at 0."""
        self._unacked.clear()
        self.in_flight_bytes = self._next = self._resend_index = 0
        self._repeating = self._probing = False
        self._backoff = 1.0
        self._reported = False

    def receive(self, header: Header, now: float) -> Verdict:
        """Take note of a frame: its acknowledgement is worked in (see `released`), its payload is judged."""
        if header.incarnation != self.peer_incarnation:
            return Verdict.FOREIGN
        self._heard_at = now
        if header.heard == self.incarnation:
            self._confirmed = True
            self._acknowledge(header.ack, now)
        elif header.heard or self._confirmed:
            self.ack_due = min(self.ack_due, now)  # tells the peer which life it is talking to
            return Verdict.FOREIGN
        if header.kind is Kind.ACK:
            return Verdict.ACK
        if header.sequence == self._expected:
            return Verdict.NEXT
        self.ack_due = min(self.ack_due, now + self._ack_delay_s)
        return Verdict.REPEATED if header.sequence < self._expected else Verdict.EARLY

    def accept(self, nbytes: int, now: float) -> None:
        """The payload judged `NEXT` was sound and is taken; its acknowledgement is owed."""
        self._expected += 1
        self._owed_bytes += nbytes
        # The sender's window is like ours: do not let it run dry for want of a word.
        due = now if self._owed_bytes * 4 >= self.window_bytes else now + self._ack_delay_s
        if due < self.ack_due:
            self.ack_due = due

    def _acknowledge(self, ack: int, now: float) -> None:
        unacked = self._unacked
        if not unacked or ack <= unacked[0].sequence or ack > self._next:
            return
        # A probe that was missing: so is the rest. If more had arrived than the probe, the timeout came too soon.
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
