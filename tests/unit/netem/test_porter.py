"""When a peer that is dialled counts as one that refuses."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from netem import porter
from netem.porter import Callee


@pytest.fixture
def callee(monkeypatch: pytest.MonkeyPatch) -> Callee:
    """A peer at whose address something speaks ZeroMQ's protocol."""
    monkeypatch.setattr(porter, "_speaks_zmtp", lambda address: True)
    return Callee("tcp://127.0.0.1:1", news=Mock())


def fail(callee: Callee, times: int) -> list[bool]:
    return [callee.refuses(False, now=float(second)) for second in range(times)]


def test_a_peer_refuses_that_fails_once_more_after_it_was_asked(callee: Callee) -> None:
    assert fail(callee, 6) == [False] * 6
    assert callee.refuses(False, 6.0)
    assert not callee.refuses(False, 7.0)


def test_a_peer_that_came_while_it_was_asked_refuses_nobody(callee: Callee) -> None:
    """The failures were those of a proxy in its place."""
    assert fail(callee, 6) == [False] * 6
    assert not callee.refuses(True, 6.0)
    assert fail(callee, 20) == [False] * 20


def test_what_does_not_speak_the_protocol_is_no_peer(callee: Callee, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porter, "_speaks_zmtp", lambda address: False)
    assert fail(callee, 40) == [False] * 40
