"""What a tracker is told, and that its failures do not end a run."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.records.tracker import Tracker
from netem.errors import ConfigError


class Service(SimpleNamespace):
    """A module with the calls of wandb and trackio."""

    def __init__(self, **fails: Exception) -> None:
        super().__init__(told=[], fails=fails)

    def _take(self, call: str, *arguments: Any, **more: Any) -> None:
        if call in self.fails:
            raise self.fails[call]
        self.told.append((call, *arguments, more))

    def init(self, **more: Any) -> None:
        self._take("init", **more)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._take("log", figures, step=step)

    def finish(self) -> None:
        self._take("finish")


def installed(monkeypatch: pytest.MonkeyPatch, service: Service) -> Service:
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


LINE = {"step": 3, "time": 12.5, "generation": 1, "loss": 2.5, "heldout_loss": None, "nodes": {"node-0": {"loss": 2.0}}}


def test_it_is_told_the_runs_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    service = installed(monkeypatch, Service())
    with Tracker("wandb", "demo", {"train": {"lr": 1e-3}}) as tracker:
        tracker.add(LINE)
    assert service.told == [
        ("init", {"project": "isthmus", "name": "demo", "config": {"train": {"lr": 1e-3}}}),
        ("log", {"time": 12.5, "loss": 2.5}, {"step": 3}),
        ("finish", {}),
    ]


def test_a_failure_is_said_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = installed(monkeypatch, Service(log=OSError("no space\non the disk")))
    with caplog.at_level(logging.WARNING), Tracker("wandb", "demo", {}) as tracker:
        tracker.add(LINE)
        tracker.add(LINE)
    assert [record.message for record in caplog.records] == ["wandb: gets no more figures of this run (no space)"]
    assert [call for call, *_ in service.told] == ["init"]


def test_a_tracker_that_cannot_be_had_is_a_mistake_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Service(init=RuntimeError("no API key")))
    with pytest.raises(ConfigError, match=r'run\.tracker = "wandb": does not take the run \(no API key\)'):
        Tracker("wandb", "demo", {})
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="is not installed; pip install trackio"):
        Tracker("trackio", "demo", {})


def test_without_a_tracker_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    service = installed(monkeypatch, Service())
    with Tracker("", "demo", {}) as tracker:
        tracker.add(LINE)
    assert service.told == []
