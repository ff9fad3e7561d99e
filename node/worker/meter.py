"""Metrics of a node beside its loss: traffic by use, waiting, and the process itself.

The wire, the inbox, the averager and the endpoint keep totals; the meter turns them into figures of one step.
`uncompressed_bytes` are the bytes that the same exchange would have sent with whole K and V (in bfloat16, or in float32
where the run sends nothing else: `PayloadFormat.uncompressed_bytes`); `replaced_bytes` is the part of them that belongs
to the compressed layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil

from coordinator.events import PER_LINK
from netem.counters import LinkCounters
from netem.names import plain
from node.exchange.inbox import Inbox
from node.exchange.wire import Wire
from node.train.averaging import Averager

USES = ("compressed", "dense", "averaging", "evaluation")
"""The uses of payload bytes: layers that compress, layers that do not, averaging rounds, and passes without gradients
(held-out evaluation, and the calibration of the basis)."""


class Meter:
    """Measures one step after another, in one world. `links` gives the endpoint's totals by peer."""

    def __init__(
        self, wire: Wire | None, inbox: Inbox, averager: Averager, links: Callable[[], Mapping[str, LinkCounters]]
    ) -> None:
        self._wire = wire
        self._inbox = inbox
        self._averager = averager
        self._links = links
        self._evaluation_s = 0.0
        self._evaluation_exposed_s = 0.0
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._before = self._totals()

    def step_metrics(self) -> dict[str, float]:
        """How much each total has grown since the last call, and the state of the process now."""
        now = self._totals()
        metrics = {key: value - self._before.get(key, 0.0) for key, value in now.items()}
        self._before = now
        late_s = max((link.lateness_max_s for link in self._links().values()), default=0.0)
        process = {"cpu_percent": self._process.cpu_percent(), "rss_bytes": float(self._process.memory_info().rss)}
        return metrics | process | {"lateness_s": late_s}

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time and waiting inside the block count as the held-out evaluation's, not as the step's."""
        began, waited_s = time.monotonic(), self._inbox.waited_s
        yield
        self._evaluation_s += time.monotonic() - began
        self._evaluation_exposed_s += self._inbox.waited_s - waited_s

    def _kept(self) -> dict[str, float]:
        """How well this host kept each link's rate, for `coordinator.records.rates.missed_links`."""
        shaped = [(plain(peer), link) for peer, link in self._links().items() if link.promised_s]
        promised = {f"{PER_LINK}{peer}/promised_s": link.promised_s for peer, link in shaped}
        return promised | {f"{PER_LINK}{peer}/missed_s": link.missed_s for peer, link in shaped}

    def _totals(self) -> dict[str, float]:
        links = self._links().values()
        sent = self._wire.sent_bytes if self._wire else {}
        payload = {f"{use}_bytes": float(sent.get(use, 0)) for use in USES}
        return (
            payload
            | self._kept()
            | {
                "uncompressed_bytes": float(sent.get("uncompressed", 0)),
                "replaced_bytes": float(sent.get("replaced", 0)),
                "exposed_s": self._inbox.waited_s - self._evaluation_exposed_s,
                "evaluation_s": self._evaluation_s,
                "evaluation_exposed_s": self._evaluation_exposed_s,
                "averaging_s": self._averager.elapsed_s,
                "sent_wire_bytes": float(sum(link.wire_bytes for link in links)),
                "received_wire_bytes": float(sum(link.received_wire_bytes for link in links)),
                "resent_bytes": float(sum(link.resent_bytes for link in links)),
            }
        )
