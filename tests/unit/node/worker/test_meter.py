"""What the meter says of one step, and that a held-out evaluation after it is told apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.records.rates import time_share
from node.worker import meter as meter_module
from node.worker.meter import Meter


def test_the_time_and_the_waiting_of_an_evaluation_are_not_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 1 s that waits 0.25 s, then an evaluation of 4 s that waits 3 s: 25 % of the step was exposed."""
    inbox: Any = SimpleNamespace(waited_s=0.0)
    averager: Any = SimpleNamespace(elapsed_s=0.0)
    now = [0.0]
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = Meter(None, inbox, averager, dict)
    inbox.waited_s += 0.25
    with meter.evaluation():
        now[0] += 4.0
        inbox.waited_s += 3.0
    first = meter.step_metrics() | {"step_s": 1.0}
    assert (first["exposed_s"], first["evaluation_s"], first["evaluation_exposed_s"]) == (0.25, 4.0, 3.0)
    assert time_share([{"nodes": {"node-0": first}}], "exposed_s") == 0.25
    inbox.waited_s += 0.5
    second = meter.step_metrics()
    assert (second["exposed_s"], second["evaluation_s"], second["evaluation_exposed_s"]) == (0.5, 0.0, 0.0)
