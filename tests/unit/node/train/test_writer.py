"""Checkpoints are written while training goes on; a disk that fails or hangs is said, and ends nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from netem.errors import IsthmusError
from node.train.writer import Writer

WAIT_S = 20.0


@dataclass(frozen=True)
class Written:
    """A snapshot whose writing is a function."""

    step: int
    act: Callable[[], None]

    def write(self) -> None:
        self.act()


class Said:
    """What the writer has reported."""

    def __init__(self) -> None:
        self.all: list[tuple[int, str]] = []
        self.threads: list[str] = []

    def __call__(self, step: int, reason: str = "") -> None:
        self.all.append((step, reason))
        self.threads.append(threading.current_thread().name)


def test_training_goes_on_while_a_snapshot_is_written_and_the_next_one_waits() -> None:
    writer, said, disk, order = Writer(), Said(), threading.Event(), []

    def slow() -> None:
        assert disk.wait(WAIT_S)
        order.append("first")

    writer.write(Written(3, slow), said)
    assert said.all == []  # and this thread is here
    threading.Timer(0.05, disk.set).start()
    writer.write(Written(6, lambda: order.append("second")), said)
    assert writer.wait()
    assert order == ["first", "second"]
    assert said.all == [(3, ""), (6, "")]
    assert said.threads == ["checkpoint-3", "checkpoint-6"]


def test_a_full_disk_is_reported_and_the_next_checkpoint_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise IsthmusError("node-0.safetensors: cannot be written: No space left on device")

    writer, said = Writer(), Said()
    writer.write(Written(3, full), said)
    writer.write(Written(6, lambda: None), said)
    assert writer.wait()
    assert said.all == [(3, "node-0.safetensors: cannot be written: No space left on device"), (6, "")]
    assert "no checkpoint after step 3, training goes on: node-0.safetensors: cannot be written" in caplog.text


def test_a_disk_that_hangs_holds_training_up_for_a_while_and_no_longer() -> None:
    writer, said, disk = Writer(limit_s=0.05), Said(), threading.Event()
    writer.write(Written(3, lambda: assert_(disk.wait(WAIT_S))), said)
    writer.write(Written(6, lambda: None), said)
    assert said.all == [(6, "the disk has not taken the checkpoint before within 0.05 s")]
    assert not writer.wait()
    disk.set()
    assert writer.wait(WAIT_S)
    writer.write(Written(9, lambda: None), said)
    assert writer.wait(WAIT_S)
    assert [step for step, _ in said.all] == [6, 3, 9]


def test_a_fault_of_our_own_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator would wait for this node's part for ever."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_type))
    writer, said = Writer(), Said()
    writer.write(Written(3, lambda: assert_(False)), said)
    assert writer.wait()
    assert said.all == [(3, "AssertionError()")]
    assert raised == [AssertionError]


def assert_(true: bool) -> None:
    if not true:
        raise AssertionError
