"""Writes checkpoints on a thread of its own, so that the disk does not hold training up.

At most one snapshot is being written; the next one waits for it. A disk that fails, for example for lack of room, is
reported, and training goes on: the checkpoints before it stay.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from netem.errors import IsthmusError

log = logging.getLogger("isthmus.checkpoint")

LIMIT_S = 120.0
"""How long the trainer waits for the checkpoint before to be on the disk. After that, the new one is left out."""


class Writable(Protocol):
    """What is written (`node.train.checkpoint.Snapshot`)."""

    @property
    def step(self) -> int: ...

    def write(self) -> None: ...


class Reporter(Protocol):
    """Is told of each checkpoint: an empty reason where this node's part is on the disk (`Session.saved`)."""

    def __call__(self, step: int, reason: str = "") -> None: ...


class Writer:
    """One node's writing of checkpoints. The calls belong to the trainer's thread."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._thread: threading.Thread | None = None

    def write(self, snapshot: Writable, report: Reporter) -> None:
        """Begin to write a snapshot, and have `report` called on the writing thread when that has ended."""
        if self.wait():
            self._thread = threading.Thread(
                target=_write, args=(snapshot, report), name=f"checkpoint-{snapshot.step}", daemon=True
            )
            self._thread.start()
        else:
            _failed(snapshot.step, f"the disk has not taken the checkpoint before within {self._limit_s:g} s", report)

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait until nothing is being written, at most so long; whether that is so."""
        if self._thread is not None:
            self._thread.join(self._limit_s if limit_s is None else limit_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True


def _write(snapshot: Writable, report: Reporter) -> None:
    try:
        snapshot.write()
    except IsthmusError as error:
        _failed(snapshot.step, str(error), report)
    except Exception as error:  # a fault of our own must not leave the others waiting for this part
        _failed(snapshot.step, repr(error), report)
        raise
    else:
        report(snapshot.step)


def _failed(step: int, reason: str, report: Reporter) -> None:
    log.warning("no checkpoint after step %d, training goes on: %s", step, reason)
    report(step, reason)
