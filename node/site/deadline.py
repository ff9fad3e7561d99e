"""Ends a process that does not come out of a collective, because another process of its site has stopped.

A process that dies closes its connections, and torch tells the others. One that is only stopped does not, and torch
(gloo) cannot be told to give a collective up. The coordinator goes on without the site, and so begins a later
generation. If this process is then still in the older one after some time, it ends, so that the site can be started
again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def end_process(text: str) -> None:
    """End this process at once, whatever its threads wait for."""
    print(f"isthmus node: {text}", file=sys.stderr, flush=True)
    os._exit(1)


class Deadline:
    """Watches that the trainer's thread comes out of a generation within `limit_s` of its end; calls `end` else."""

    def __init__(self, limit_s: float, end: Callable[[str], None] = end_process) -> None:
        self._limit_s = limit_s
        self._end = end
        self._lock = threading.Lock()
        self._inside = 0  # the generation that the trainer's thread is in; 0 for none
        self._newest = 0
        self._timer: threading.Timer | None = None

    @contextmanager
    def inside(self, generation: int) -> Iterator[None]:
        """The trainer's thread is in this generation."""
        with self._lock:
            self._inside = generation
            self._watch()
        try:
            yield
        finally:
            with self._lock:
                self._inside = 0
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def over(self, generation: int) -> None:
        """All generations before this one are over; from any thread."""
        with self._lock:
            self._newest = max(self._newest, generation)
            self._watch()

    def _watch(self) -> None:
        if 0 < self._inside < self._newest and self._timer is None:
            self._timer = threading.Timer(self._limit_s, self._expire, (self._inside,))
            self._timer.daemon = True
            self._timer.start()

    def _expire(self, generation: int) -> None:
        with self._lock:
            stuck = self._inside == generation
        if stuck:
            self._end(
                f"generation {generation} has been over for {self._limit_s:g} s, and this process still waits for "
                "another one of its site, which does not answer; start the site again"
            )
