"""A corpus that is opened while the node joins."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from netem.errors import ConfigError, RunAborted
from node.worker import opening as opening_module
from node.worker.opening import Opening

TASK = object()


class Session:
    """Joins a node that has no data yet, and asks for them until they are there, or the run is over."""

    def __init__(self, on_ask: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self._on_ask = on_ask

    def enter(self, has_data: Callable[[], bool]) -> None:
        while not has_data():
            self.asked += 1
            self._on_ask()


def test_a_corpus_that_is_there_is_taken_without_joining_first() -> None:
    opening = Opening(lambda: TASK)  # type: ignore[arg-type, return-value]
    assert opening.wait(10.0)
    session = Session()
    assert opening.take(session, lambda: None) is TASK
    assert session.asked == 0


def test_a_node_joins_while_its_corpus_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_module, "POLL_S", 0.01)
    made = threading.Event()

    def make() -> object:
        made.wait(10.0)
        return TASK

    opening = Opening(make)  # type: ignore[arg-type]
    assert not opening.wait(0.0)
    session = Session(made.set)
    assert opening.take(session, lambda: None) is TASK
    assert session.asked >= 1


def test_a_mistake_is_raised_where_the_corpus_is_waited_for() -> None:
    def fail() -> object:
        raise ConfigError("data.corpus: no such file")

    opening = Opening(fail)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such file"):
        opening.wait(10.0)
    with pytest.raises(ConfigError, match="no such file"):
        opening.take(Session(), lambda: None)


def test_a_run_that_ends_meanwhile_is_not_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_module, "POLL_S", 0.01)
    never = threading.Event()

    def end() -> None:
        raise RunAborted("the run is over")

    with pytest.raises(RunAborted, match="the run is over"):
        Opening(never.wait).take(Session(end), lambda: None)  # type: ignore[arg-type]
    never.set()
