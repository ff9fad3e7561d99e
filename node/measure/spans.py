"""Where the time of a node's steps goes: one recorder for the trainer's thread.

A span is opened round a piece of work or a wait: `with spans.span(FORWARD): …`. Spans nest. The time of a step is split
among the accounts without gaps and overlaps: each moment belongs to the innermost open span, and to `compute` where
none is open. Inside a span of another account than `compute` nothing is told apart: waiting inside an evaluation is the
evaluation's. Where a step is recorded, its single spans and messages are kept too (`node.measure.trace_file`).

On a GPU the trainer's thread hands work over and goes on, so what it waits for on the network may have been hidden by
work of the device: exposed communication is then an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

COMPUTE, EXPOSED_FORWARD, EXPOSED_BACKWARD, AVERAGING, CHECKPOINT, BARRIER, EVALUATION = range(7)
ACCOUNTS: Final = (
    "compute",
    "exposed_forward",
    "exposed_backward",
    "averaging",
    "checkpoint",
    "barrier",
    "evaluation",
)
"""The names of the accounts. Together they are the step."""


class Kind(NamedTuple):
    """What a span is, and to which account its time belongs."""

    name: str
    account: int


FORWARD = Kind("forward", COMPUTE)
BACKWARD = Kind("backward", COMPUTE)
OPTIMIZER = Kind("optimizer", COMPUTE)
ENCODE = Kind("encode", COMPUTE)
DECODE = Kind("decode", COMPUTE)
SEND = Kind("send", COMPUTE)
WAIT_PAYLOAD = Kind("wait for a payload", EXPOSED_FORWARD)
WAIT_GRADIENT = Kind("wait for a gradient", EXPOSED_BACKWARD)
ROOM_FORWARD = Kind("wait for room to send a payload", EXPOSED_FORWARD)
ROOM_BACKWARD = Kind("wait for room to send a gradient", EXPOSED_BACKWARD)
ROUND = Kind("averaging", AVERAGING)
SEND_SHARD = Kind("send a shard", AVERAGING)
WAIT_SHARD = Kind("wait for a shard", AVERAGING)
ROOM_SHARD = Kind("wait for room to send a shard", AVERAGING)
SAVE = Kind("checkpoint", CHECKPOINT)
GO = Kind("wait for Go", BARRIER)
EVALUATE = Kind("evaluation", EVALUATION)

KINDS: Final = {
    kind.name: kind
    for kind in (
        *(FORWARD, BACKWARD, OPTIMIZER, ENCODE, DECODE, SEND, WAIT_PAYLOAD, WAIT_GRADIENT, ROOM_FORWARD, ROOM_BACKWARD),
        *(ROUND, SEND_SHARD, WAIT_SHARD, ROOM_SHARD, SAVE, GO, EVALUATE),
    )
}
"""Every kind, by name."""

NO_LAYER = -1


class Span(NamedTuple):
    """One span of a recorded step. Times are seconds of the recorder's clock."""

    kind: str
    layer: int
    pass_no: int
    began_s: float
    ended_s: float


class Sent(NamedTuple):
    """A message handed to the network: its name, which sender and reader know it by, the reader's rank, and when its
    first byte could leave: never after its reader took it."""

    name: str
    rank: int
    nbytes: int
    sent_s: float


class Taken(NamedTuple):
    """A message that the trainer has taken: its name, the sender's rank, when it had arrived and when it was taken."""

    name: str
    rank: int
    nbytes: int
    arrived_s: float
    taken_s: float


@dataclass
class Record:
    """The single spans and messages of one step. A span is listed when it ends."""

    spans: list[Span] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)


class StepTime(NamedTuple):
    """The time of one step. The values of `accounts_s` add up to `ended_s` − `began_s`."""

    began_s: float
    ended_s: float
    accounts_s: dict[str, float]
    waits_s: dict[tuple[int, int], float]
    """Exposed time by account and layer."""
    record: Record | None

    @property
    def total_s(self) -> float:
        """The step's wall time."""
        return self.ended_s - self.began_s


class Spans:
    """The recorder. It belongs to one node; its calls come from the trainer's thread, or from the thread that runs
    autograd's backward while the trainer's thread waits for it. Only `aside` is for other threads. `clock` is that of
    `netem.endpoint` (monotonic)."""

    __slots__ = ("_account", "_began_s", "_mark_s", "_open", "_totals_s", "_waits_s", "clock", "record")

    record: Record | None
    """Where the single spans and messages of this step are kept; None in an ordinary step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._open: list[tuple[int, Kind, int, int, float]] = []
        self.begin(recorded=False)

    def begin(self, *, recorded: bool) -> None:
        """A step begins now; no span is open. With `recorded`, single spans and messages are kept."""
        assert not self._open
        self.record = Record() if recorded else None
        self._totals_s = [0.0] * len(ACCOUNTS)
        self._waits_s: dict[tuple[int, int], float] = {}
        self._account = COMPUTE
        self._began_s = self._mark_s = self.clock()

    def end(self) -> StepTime:
        """The step ends now. `begin` follows."""
        assert not self._open
        now_s = self.clock()
        self._totals_s[COMPUTE] += now_s - self._mark_s
        accounts_s = dict(zip(ACCOUNTS, self._totals_s, strict=True))
        return StepTime(self._began_s, now_s, accounts_s, self._waits_s, self.record)

    def span(self, kind: Kind, layer: int = NO_LAYER, pass_no: int = 0) -> Spans:
        """Open a span, which ends with the `with` block. The recorder itself is the context manager: that is cheap."""
        now_s = self.clock()
        account = self._account
        self._totals_s[account] += now_s - self._mark_s
        self._mark_s = now_s
        self._open.append((account, kind, layer, pass_no, now_s))
        if account == COMPUTE:
            self._account = kind.account
        return self

    @contextmanager
    def aside(self, kind: Kind) -> Iterator[None]:
        """A span that any thread may open. It is listed in the recorded step in which it ends, and the time of the step
        does not change: the trainer's thread accounts for itself."""
        began_s = self.clock()
        yield
        if (record := self.record) is not None:
            record.spans.append(Span(kind.name, NO_LAYER, 0, max(began_s, self._began_s), self.clock()))

    def note_sent(self, message: Sent) -> None:
        """List a message in the recorded step. One that was sent across the step's beginning counts from there, as the
        span does in which it was sent."""
        if (record := self.record) is not None:
            record.sent.append(message._replace(sent_s=max(message.sent_s, self._began_s)))

    def __enter__(self) -> None:
        """The span is open already."""

    def __exit__(self, *_: object) -> None:
        now_s = self.clock()
        elapsed_s = now_s - self._mark_s
        self._mark_s = now_s
        own = self._account
        self._totals_s[own] += elapsed_s
        self._account, kind, layer, pass_no, began_s = self._open.pop()
        if EXPOSED_FORWARD <= own <= EXPOSED_BACKWARD:
            self._waits_s[own, layer] = self._waits_s.get((own, layer), 0.0) + elapsed_s
        if self.record is not None:
            self.record.spans.append(Span(kind.name, layer, pass_no, began_s, now_s))
