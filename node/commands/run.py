"""`isthmus run`: a whole run on this machine, a coordinator and its nodes as child processes.

The parent computes nothing: it starts the children with their logs apart, shows what the coordinator records, and
sees to it that nothing is left running, however the run ends. Children are in sessions of their own, so Ctrl-C
reaches only the parent, which ends the run in good order; should the parent itself be killed, the coordinator finds
its standard input closed and ends the run.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from coordinator.records.folder import ADDRESS, CONFIG, LOGS, METRICS, latest_complete, make_folder
from netem import host
from netem.errors import ConfigError, RunAborted
from netem.profile import resolve
from node.commands.node import interrupt
from node.config import TOKEN_VARIABLE, Config, save_config
from node.data import open_data
from node.data.task import check_room
from node.train.resume import start_step
from node.watch.view import View

log = logging.getLogger("isthmus.run")

START_TIMEOUT_S = 30.0
GRACE_S = 10.0
POLL_S = 0.2
LOG_LINES_SHOWN = 12
USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""


@dataclass
class Child:
    """One process of the swarm."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path


def run_swarm(config: Config) -> Config:
    """Run to the end; the config as run (its name may have got a number). Raises `RunAborted` where it fails."""
    # Several processes share the cores here: a thread that spins while it waits takes them from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    check_corpus(config)
    config = prepare(config)
    if text := host.warning(resolve(config.net), config.coordinator.nodes):
        log.warning("%s", text)
    swarm = Swarm(config)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        swarm.start()
        with View(config) as view:
            swarm.follow(view)
    except KeyboardInterrupt:
        swarm.interrupt()
        if checkpoint := latest_complete(config.run.folder):
            log.info("%s is complete: go on with --run.name %s --run.resume true", checkpoint, config.run.name)
        raise
    finally:
        swarm.end()
    return config


def check_corpus(config: Config) -> None:
    """Tokenise the corpus once, for all nodes, and see that it holds a context. Raises `ConfigError`."""
    check_room(open_data(config.data), config.model.context, config.train.batch)


def prepare(config: Config) -> Config:
    """Give a new run a folder of its own, and write its config there. A folder in use is never written over."""
    if config.run.resume:
        start_step(config)  # before anything is written: a mistake must leave the run as it is
        make_folder(config.run.folder / LOGS)
    else:
        config = _claim_folder(config)
    if not config.run.threads:
        threads = max(1, (os.cpu_count() or 1) // config.coordinator.nodes)
        config = _with_run(config, threads=threads)
    save_config(config, config.run.folder / CONFIG)
    (config.run.folder / ADDRESS).unlink(missing_ok=True)
    return config


def _claim_folder(config: Config) -> Config:
    """Make the first of outputs/NAME, NAME-2, … that is not there yet; of two runs at once each gets its own."""
    name, number = config.run.name, 1
    while True:
        named = _with_run(config, name=name)
        try:
            make_folder(named.run.folder / LOGS, exist_ok=False)
        except FileExistsError:
            number += 1
            name = f"{config.run.name}-{number}"
        else:
            return named


def _with_run(config: Config, **changes: Any) -> Config:
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **changes))


class Swarm:
    """The child processes of one run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = config.run.folder
        self._children: list[Child] = []
        self._ended: dict[str, float] = {}  # when each was found to have ended, in that order
        token = config.coordinator.token or secrets.token_urlsafe(24)
        self._environment = os.environ | {TOKEN_VARIABLE: token}

    def start(self) -> None:
        """Start the coordinator, and when it listens, the nodes."""
        config_path = str(self._folder / CONFIG)
        self._spawn("coordinator", "coordinator", config_path, "--stop-at-eof")
        address = self._await_address()
        for rank in range(self._config.coordinator.nodes):
            self._spawn(f"node-{rank}", "node", config_path, "--join", address, "--rank", str(rank))

    def follow(self, view: View) -> None:
        """Show what the coordinator records until all have ended. Raises `RunAborted` where the run fails."""
        records = _follow_lines(self._folder / METRICS, skip=_lines(self._folder / METRICS))
        while not self._over():
            self._show(records, view)
            view.tick()
            time.sleep(POLL_S)
        self._show(records, view)
        self._raise_failures()

    def _show(self, records: Iterator[dict[str, Any] | None], view: View) -> None:
        while (record := next(records)) is not None:
            view.feed(record)

    def _over(self) -> bool:
        """Whether all have ended, or those that have not have had their time: the others of a node that failed as long
        as it takes to find that out, what is left without coordinator or without nodes only `GRACE_S`."""
        now = time.monotonic()
        coordinator, *nodes = self._children
        for child in (*nodes, coordinator):  # one that failed first is found first; the coordinator only tells of it
            if child.process.poll() is not None and child.name not in self._ended:
                self._ended[child.name] = now
        if not self._ended:
            return False
        first_s = now - next(iter(self._ended.values()))
        last_s = now - next(reversed(self._ended.values()))
        alone = coordinator.name in self._ended or all(node.name in self._ended for node in nodes)
        failed = any(child.process.poll() for child in self._children)
        return (
            len(self._ended) == len(self._children)
            or (alone and last_s > GRACE_S)
            or (failed and first_s > self._config.coordinator.heartbeat_timeout_s + GRACE_S)
        )

    def interrupt(self) -> None:
        """Ask the coordinator to end the run for all."""
        log.info("stopping …")
        if self._children and self._children[0].process.poll() is None:
            self._children[0].process.send_signal(signal.SIGTERM)
        self._await_children(GRACE_S)

    def end(self) -> None:
        """Leave no process behind: those that still run are terminated, then killed."""
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
            running = [child for child in self._children if child.process.poll() is None]
            for child in running:
                stop(child.process)
            self._await_children(5.0)
        for child in self._children:
            if child.process.stdin:
                child.process.stdin.close()

    def _spawn(self, name: str, *arguments: str) -> None:
        log_path = self._folder / LOGS / f"{name}.log"
        with log_path.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "node.cli", *arguments],
                stdin=subprocess.PIPE if name == "coordinator" else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._children.append(Child(name, process, log_path))

    def _await_address(self) -> str:
        path = self._folder / ADDRESS
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if path.exists() and (address := path.read_text()).endswith("\n"):
                return address.strip()
            if self._children[0].process.poll() is not None:
                self._raise_failures()
            time.sleep(0.02)
        raise RunAborted(f"the coordinator did not listen within {START_TIMEOUT_S:g} s: {self._children[0].log_path}")

    def _await_children(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(child.process.poll() is None for child in self._children):
            time.sleep(0.02)

    def _raise_failures(self) -> None:
        """Name the child that failed first: one that was killed could not say why, the others only tell of it."""
        order = [*self._ended, *(child.name for child in self._children if child.name not in self._ended)]
        failed = [child for child in self._children if child.process.poll() not in (0, None)]
        if not failed:
            if stuck := [child.name for child in self._children if child.process.poll() is None]:
                raise RunAborted(f"{', '.join(stuck)} did not end, and was stopped; logs are in {self._folder / LOGS}")
            return
        culprit = min(
            failed, key=lambda child: (_code(child) >= 0, _code(child) != USER_ERROR, order.index(child.name))
        )
        lines = _tail(culprit.log_path)
        if _code(culprit) == USER_ERROR and lines:
            raise ConfigError(f"{culprit.name}: {lines[-1].partition('error: ')[2] or lines[-1]}")
        shown = "".join(f"\n    {line}" for line in lines)
        raise RunAborted(f"{culprit.name} ended with {_how(_code(culprit))}; logs are in {self._folder / LOGS}{shown}")


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


def _code(child: Child) -> int:
    return child.process.returncode or 0


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0  # the recorder drops one that is torn


def _follow_lines(path: Path, skip: int) -> Iterator[dict[str, Any] | None]:
    """Records as they are written; None where there is none just now. Only whole lines count."""
    handle: IO[str] | None = None
    pending = ""
    while True:
        if handle is None and path.exists():
            handle = path.open(encoding="utf-8")
        pending += handle.readline() if handle else ""
        if not pending.endswith("\n"):
            yield None
            continue
        line, pending = pending, ""
        if skip:
            skip -= 1
        else:
            yield json.loads(line)
