"""`isthmus watch`: the live view of a run, from any machine that reaches its coordinator, or from the run's folder."""

from __future__ import annotations

import math
import time
import tomllib
from pathlib import Path
from typing import Any

from coordinator.keyring import OperatorKeys
from coordinator.messages import Watched
from coordinator.operator import Operator
from coordinator.records.folder import CONFIG, METRICS
from coordinator.records.follow import Follower
from coordinator.records.lock import is_locked
from coordinator.records.metrics import parse_record
from netem.config import load_toml
from netem.errors import ConfigError, ProtocolError, RunAborted
from node.commands.change import address_of, keys_of
from node.config import Config, recorded_config
from node.watch.console import LastingConsole
from node.watch.view import View

POLL_S = 0.25
ASK_EVERY_S = 1.0
LOOK_EVERY_S = 10.0
"""Seconds between two looks at the lock of a quiet run's folder. A look holds the lock for a moment, in which no
coordinator could start there."""


def watch(where: str, key: Path | None) -> None:
    """Show the run at `where` (its coordinator's address, or its folder) until it ends.

    Raises `ConfigError` where there is no run, and `RunAborted` where it has ended before its last step.
    """
    if where.startswith("tcp://"):
        address = address_of(where, "WHERE")
        _watch_from_afar(address, keys_of(where, key, watches=True))
    else:
        _watch_folder(Path(where))


def _watch_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; give that of a run, such as outputs/demo, or its coordinator's address, such "
            "as tcp://10.0.0.5:7070"
        )
    config = recorded_config(load_toml(folder / CONFIG))
    follower = Follower(folder / METRICS)
    news = follower.read()
    step, looked_s, served = 0, -math.inf, True
    with View(config, console=LastingConsole(), gone_s=_age_s(news)) as view:
        while True:
            step = _feed(view, news, step)
            # Before the next reading: what was written before the end is still shown.
            if not news and time.monotonic() - looked_s > LOOK_EVERY_S:
                looked_s, served = time.monotonic(), is_locked(folder)
            news = follower.read()
            if not news and (step >= config.train.steps or not served):
                break
            view.tick()
            time.sleep(0 if news else POLL_S)
    _check_end(config, step, f"no coordinator serves {folder} now")


def _age_s(records: list[dict[str, Any]]) -> float:
    began_s = records[0].get("time") if records else None
    return max(0.0, time.time() - began_s) if isinstance(began_s, float) else 0.0


def _watch_from_afar(address: str, keys: OperatorKeys) -> None:
    with Operator(address, keys) as operator:
        news = operator.watch(0)
        config = _config_of(news)
        step = 0
        with View(config, console=LastingConsole(), gone_s=news.elapsed_s) as view:
            while True:
                step = _feed(view, _records_of(news, address), step)
                view.tell(news.state)
                asked_s = time.monotonic()
                while time.monotonic() - asked_s < ASK_EVERY_S:
                    view.tick()
                    time.sleep(POLL_S)
                if step >= config.train.steps:
                    break
                try:
                    news = operator.watch(news.number)
                except ConfigError as error:
                    raise RunAborted(f"{error}; the last step seen is {step} of {config.train.steps}") from None


def _feed(view: View, records: list[dict[str, Any]], step: int) -> int:
    for record in records:
        view.feed(record)
        step = int(record["step"])
    return step


def _config_of(news: Watched) -> Config:
    try:
        return recorded_config(tomllib.loads(news.config))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProtocolError(f"the coordinator sent a config that is not TOML: {error}") from None


def _records_of(news: Watched, address: str) -> list[dict[str, Any]]:
    return [parse_record(Path(address), number, line.encode()) for number, line in enumerate(news.lines, 1)]


def _check_end(config: Config, step: int, why: str) -> None:
    if step < config.train.steps:
        raise RunAborted(f"{why}; the last step recorded is {step} of {config.train.steps}")
