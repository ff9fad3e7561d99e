"""A step's time is split without gaps and overlaps, whatever is opened in it, and what it costs to do so."""

from __future__ import annotations

import math
import random
import timeit
from contextlib import ExitStack

import pytest

from node.measure.spans import (
    ACCOUNTS,
    BACKWARD,
    EVALUATE,
    EXPOSED_BACKWARD,
    EXPOSED_FORWARD,
    FORWARD,
    GO,
    KINDS,
    ROOM_FORWARD,
    ROUND,
    SAVE,
    SEND,
    WAIT_GRADIENT,
    WAIT_PAYLOAD,
    WAIT_SHARD,
    Kind,
    Record,
    Span,
    Spans,
)


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def test_each_moment_belongs_to_the_innermost_span() -> None:
    clock = Clock()
    spans = Spans(clock)
    clock.wait(7)  # between two steps
    spans.begin(recorded=False)
    with spans.span(GO):
        clock.wait(1)
    with spans.span(FORWARD):
        clock.wait(2)
        with spans.span(SEND, 3, 1):
            clock.wait(0.5)
            with spans.span(ROOM_FORWARD, 3, 1):
                clock.wait(4)
        with spans.span(WAIT_PAYLOAD, 5, 1):
            clock.wait(8)
    with spans.span(BACKWARD), spans.span(WAIT_GRADIENT, 5, 1):
        clock.wait(16)
    with spans.span(SAVE):
        clock.wait(32)
    clock.wait(0.25)
    step = spans.end()
    assert step.accounts_s == {
        "compute": 2.75,
        "exposed_forward": 12,
        "exposed_backward": 16,
        "averaging": 0,
        "checkpoint": 32,
        "barrier": 1,
        "evaluation": 0,
    }
    assert step.waits_s == {(EXPOSED_FORWARD, 3): 4, (EXPOSED_FORWARD, 5): 8, (EXPOSED_BACKWARD, 5): 16}
    assert (step.began_s, step.total_s, step.record) == (107, 63.75, None)
    spans.begin(recorded=False)
    assert set(spans.end().accounts_s.values()) == {0}


def test_what_an_evaluation_or_a_round_waits_for_is_its_own() -> None:
    clock = Clock()
    spans = Spans(clock)
    with spans.span(EVALUATE):
        clock.wait(1)
        with spans.span(FORWARD), spans.span(WAIT_PAYLOAD, 0, 1):
            clock.wait(2)
    with spans.span(ROUND), spans.span(WAIT_SHARD):
        clock.wait(4)
    step = spans.end()
    assert (step.accounts_s["evaluation"], step.accounts_s["averaging"]) == (3, 4)
    assert sum(step.accounts_s.values()) == 7
    assert step.waits_s == {}


def test_the_parts_add_up_to_the_step_whatever_happens() -> None:
    chance, clock = random.Random(3), Clock()
    spans = Spans(clock)

    def work(depth: int) -> None:
        for _ in range(chance.randrange(4)):
            clock.wait(chance.random())
            try:
                with spans.span(chance.choice([*KINDS.values()]), chance.randrange(4), 1):
                    clock.wait(chance.random())
                    if depth < 5:
                        work(depth + 1)
                    if chance.random() < 0.1:
                        raise TimeoutError
            except TimeoutError:
                pass

    for _ in range(200):
        spans.begin(recorded=chance.random() < 0.5)
        work(0)
        step = spans.end()
        assert min(step.accounts_s.values()) >= 0
        assert math.fsum(step.accounts_s.values()) == pytest.approx(step.total_s, rel=1e-9, abs=1e-9)


def test_a_recorded_step_keeps_its_spans() -> None:
    clock = Clock()
    spans = Spans(clock)
    spans.begin(recorded=True)
    with spans.span(FORWARD):
        clock.wait(1)
        with spans.span(WAIT_PAYLOAD, 2, 9):
            clock.wait(2)
    record = spans.end().record
    assert record == Record([Span("wait for a payload", 2, 9, 101, 103), Span("forward", -1, 0, 100, 103)], [], [])
    spans.begin(recorded=False)
    with spans.span(FORWARD):
        pass
    assert spans.end().record is None


def test_what_goes_on_beside_the_trainer_is_recorded_and_costs_the_step_nothing() -> None:
    """A round on a thread of its own may begin and end anywhere in the trainer's spans, and outlast a step."""
    clock = Clock()
    spans = Spans(clock)
    spans.begin(recorded=True)
    with ExitStack() as round_of_its_own:
        with spans.span(FORWARD):
            clock.wait(1)
            round_of_its_own.enter_context(spans.aside(WAIT_SHARD))
            clock.wait(2)
        clock.wait(4)
        first = spans.end()
        spans.begin(recorded=True)
        clock.wait(8)
    second = spans.end()
    assert (first.accounts_s["compute"], first.accounts_s["averaging"]) == (7, 0)
    assert first.record == Record([Span("forward", -1, 0, 100, 103)])
    assert second.accounts_s["compute"] == 8
    assert second.record == Record([Span("wait for a shard", -1, 0, 107, 115)])
    spans.begin(recorded=False)
    with spans.aside(WAIT_SHARD):
        clock.wait(1)
    assert spans.end().record is None


def test_the_list_of_kinds_is_closed_and_every_account_has_one() -> None:
    assert all(isinstance(kind, Kind) and KINDS[kind.name] is kind for kind in KINDS.values())
    assert {kind.account for kind in KINDS.values()} == set(range(len(ACCOUNTS)))


def test_a_span_costs_about_a_microsecond() -> None:
    """Measured: 0.6 to 0.9 µs on a busy core. A step of the 800M model opens about 2,000 in seconds."""
    spans = Spans()

    def one() -> None:
        with spans.span(WAIT_PAYLOAD, 3, 1):
            pass

    assert min(timeit.repeat(one, number=2000, repeat=10)) / 2000 < 10e-6
