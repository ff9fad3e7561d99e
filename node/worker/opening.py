"""Opens the corpus on a thread of its own, so that a node whose corpus must first be tokenised can join meanwhile.

Most corpora are in the cache, and are there before the node asks to join; then nothing of this shows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from node.data import Task

log = logging.getLogger("isthmus.node")

HEAD_START_S = 10.0
"""So long a node waits for its corpus before it joins without. A mistake in the settings shows by then."""
POLL_S = 0.25


class Entering(Protocol):
    """The part of `coordinator.client.Session` that joins before there is data."""

    def enter(self, has_data: Callable[[], bool]) -> None: ...


class Opening:
    """A corpus that `open_task` opens, from now on."""

    def __init__(self, open_task: Callable[[], Task]) -> None:
        self._open_task = open_task
        self._task: Task | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="corpus", daemon=True).start()

    def wait(self, limit_s: float) -> bool:
        """Wait for the corpus, at most so long; whether it is there. Raises what opening it has raised."""
        there = self._ended.wait(limit_s)
        if self._error is not None:
            raise self._error
        return there

    def take(self, session: Entering, connect: Callable[[], None]) -> Task:
        """The corpus. Where it is still being prepared, this node connects and joins now, and the others wait for it.

        Raises as `wait` and `Session.enter` do.
        """
        if not self.wait(0.0):
            log.info("the corpus is still being prepared; joining meanwhile")
            connect()
            session.enter(lambda: self.wait(POLL_S))
        assert self._task is not None
        return self._task

    def _run(self) -> None:
        try:
            self._task = self._open_task()
        except BaseException as error:  # noqa: BLE001  it is raised where the corpus is waited for
            self._error = error
        finally:
            self._ended.set()
