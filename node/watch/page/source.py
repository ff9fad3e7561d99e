"""Keeps a page's state up to date with a run's folder, and wakes those that wait for news."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from coordinator.records.folder import METRICS
from coordinator.records.follow import Follower
from netem.errors import ConfigError
from node.config import Config
from node.watch.page.state import Json, PageState

log = logging.getLogger("isthmus.dashboard")

POLL_S = 0.5


class Source:
    """The state of one run's page. `follow` runs as a task of the server's event loop."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.state = PageState(config)
        self.problem: str | None = None  # why the records cannot be read any further
        self._records = Follower(folder / METRICS)
        self._news = asyncio.Condition()
        self._version = 0

    async def follow(self) -> None:
        """Read records as they come, for ever or until one is damaged."""
        while True:
            try:
                records = await run_in_threadpool(self._records.read)
            except (ConfigError, OSError) as error:
                self.problem = str(error)
                log.error("%s", error)
                await self._tell()
                return
            for record in records:
                self.state.feed(record)
            if records:
                await self._tell()
            else:
                await asyncio.sleep(POLL_S)

    async def news(self, seen: int, after_step: int, limit_s: float) -> tuple[int, Json | None]:
        """What is new after version `seen` for a page that has the steps up to `after_step`, and the version that it
        is of; None where nothing came within `limit_s`."""
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(lambda: self._version > seen), limit_s)
            except TimeoutError:
                return seen, None
        return self._version, self.overview_news(after_step)

    def overview(self) -> Json:
        """All that a page needs when it opens."""
        return self.state.overview() | {"version": self._version, "problem": self.problem}

    def overview_news(self, after_step: int) -> Json:
        """What has changed since `after_step`."""
        return self.state.news(after_step) | {"version": self._version, "problem": self.problem}

    async def _tell(self) -> None:
        async with self._news:
            self._version += 1
            self._news.notify_all()
