"""`isthmus run`: a whole run on this machine, a coordinator and its nodes as child processes.

The parent computes nothing: it starts the children, each with a log of its own, and shows what the coordinator records.
Ctrl-C reaches only the parent, which ends the run in good order. However the run ends, no process is left running
(`netem.children`).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from coordinator.layout import check_stages
from coordinator.messages import COORDINATOR
from coordinator.records.folder import (
    ADDRESS,
    CONFIG,
    LOGS,
    METRICS,
    discard_unstarted,
    latest_complete,
    make_folder,
)
from coordinator.records.follow import Follower
from coordinator.records.lock import STARTING, locked
from coordinator.records.secret import drop_secret
from coordinator.records.state_file import STATE, drop_state
from netem import host
from netem.children import USER_ERROR, Child, Children, failed_first
from netem.errors import ConfigError, RunAborted
from netem.profile import resolve, resolve_schedule
from node.commands.coordinator import settle_assignment
from node.commands.dashboard import PageWish, start_page
from node.commands.node import interrupt
from node.config import OPERATOR_VARIABLE, TOKEN_VARIABLE, Config, save_config
from node.data import open_data
from node.data.task import check_room
from node.train.resume import check_can_start, log_changes
from node.watch.console import LastingConsole
from node.watch.view import View

log = logging.getLogger("isthmus.run")

START_TIMEOUT_S = 30.0
STOP_S = 1.5
"""How long the coordinator may take to end the run for all nodes, before each process is terminated."""
GRACE_S = 10.0
POLL_S = 0.2
MOST_RESTARTS = 3
"""How often a coordinator that was killed is started again."""


def run_swarm(config: Config, page: PageWish | None = None) -> Config:
    """Run to the end; the config as run (its name may have got a number). Raises `RunAborted` where it fails."""
    check_stages(config.coordinator.layout)
    if config.coordinator.keys:
        raise ConfigError(
            f"coordinator.keys = {config.coordinator.keys!r}: isthmus run draws a token for its own processes; "
            "keys are for isthmus coordinator and isthmus node"
        )
    config = settle_assignment(config)
    check_network(config)
    check_corpus(config)
    if text := host.warning(resolve(config.net), config.coordinator.nodes):
        log.warning("%s", text)
    with prepared(config) as config:
        _run(config, page)
    return config


def _run(config: Config, page: PageWish | None) -> None:
    swarm = Swarm(config, page)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        swarm.start()
        with View(config, console=LastingConsole()) as view:
            swarm.follow(view)
    except KeyboardInterrupt:
        swarm.stop()
        if checkpoint := latest_complete(config.run.folder):
            log.info("%s is complete: go on with --run.name %s --run.resume true", checkpoint, config.run.name)
        raise
    finally:
        swarm.end()


def check_network(config: Config) -> None:
    """See that the profile speaks only of nodes that this run will have. Raises `ConfigError`."""
    names = [f"node-{rank}" for rank in range(config.coordinator.nodes)]
    if (reason := resolve_schedule(config.net).unmatched([*names, COORDINATOR])) is not None:
        raise ConfigError(reason)


def check_corpus(config: Config) -> None:
    """Tokenise the corpus once, for all nodes, and see that it holds a context. Raises `ConfigError`."""
    check_room(open_data(config.data), config.model.context, config.train.batch)


@contextmanager
def prepared(config: Config) -> Iterator[Config]:
    """Hold the run's folder, with the config written there; a new run gets a folder of its own.

    Raises `ConfigError` where the folder is in use. A new run that fails by a `ConfigError` leaves no folder behind.
    """
    if config.run.resume:
        check_can_start(config)  # before anything is written: a mistake must leave the run as it is
    else:
        config = _claim_folder(config)
    try:
        with locked(config.run.folder, STARTING):
            yield _prepare(config)
    except ConfigError:
        if not config.run.resume:
            discard_unstarted(config.run.folder)
        raise


def _prepare(config: Config) -> Config:
    if config.run.resume:
        check_can_start(config)
        log_changes(config)
        make_folder(config.run.folder / LOGS)
    save_config(config, config.run.folder / CONFIG)
    (config.run.folder / ADDRESS).unlink(missing_ok=True)
    drop_state(config.run.folder / STATE)  # its nodes were of an earlier `isthmus run`, and are gone
    return config


def _claim_folder(config: Config) -> Config:
    """Make the first of outputs/NAME, NAME-2, … that is not there yet; of two runs at once each gets its own."""
    name, number = config.run.name, 1
    while True:
        named = _with_run(config, name=name)
        try:
            make_folder(named.run.folder, exist_ok=False)
        except FileExistsError:
            number += 1
            name = f"{config.run.name}-{number}"
        else:
            make_folder(named.run.folder / LOGS)
            return named


def _with_run(config: Config, **changes: Any) -> Config:
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **changes))


class Swarm:
    """The child processes of one run."""

    def __init__(self, config: Config, page: PageWish | None = None) -> None:
        self._config = config
        self._page = page
        self._folder = config.run.folder
        self._children = Children()
        self._coordinator: Child | None = None
        self._nodes: list[Child] = []
        self._has_begun = False  # the first step is done
        self._restarts = 0  # of the coordinator
        self._told: set[str] = set()  # nodes whose end has been said
        token = config.coordinator.token or secrets.token_urlsafe(24)
        self._environment = os.environ | {TOKEN_VARIABLE: token}
        if config.coordinator.operator:
            self._environment[OPERATOR_VARIABLE] = config.coordinator.operator

    def start(self) -> None:
        """Start the coordinator, and when it listens, the nodes."""
        config_path = str(self._folder / CONFIG)
        self._coordinator = self._spawn("coordinator", "coordinator", config_path)
        address = self._await_address(self._coordinator)
        if self._page is not None:
            start_page(
                self._children, self._folder, self._page, self._folder / LOGS / "dashboard.log", self._environment
            )
        for rank in range(self._config.coordinator.nodes):
            command = ("node", config_path, "--join", address, "--rank", str(rank))
            for name, environment in self._processes(f"node-{rank}"):
                self._nodes.append(self._spawn(name, *command, environment=environment))

    def follow(self, view: View) -> None:
        """Show what the coordinator records until all have ended. Raises `RunAborted` where the run fails."""
        records = Follower(self._folder / METRICS, from_end=True)
        while not self._over():
            self._bring_back()
            self._show(records, view)
            view.tick()
            time.sleep(POLL_S)
        self._show(records, view)
        self._raise_failures()

    def stop(self) -> None:
        """Ask the coordinator to end the run for all, and wait a little for that. `end` ends those that remain.

        Before the first step is done nothing can be lost, and a node may not have joined, so that the coordinator's
        word does not reach it: all are asked then.
        """
        log.info("stopping the run")
        if self._coordinator is not None:
            for child in [self._coordinator] if self._has_begun else self._all():
                child.terminate()
            self._children.await_all(STOP_S)

    def end(self) -> None:
        """Leave no process behind, nor the secret that they had."""
        self._children.end()
        drop_secret(self._folder)

    def _show(self, records: Follower, view: View) -> None:
        for record in records.read():
            self._has_begun = True
            view.feed(record)

    def _over(self) -> bool:
        """Whether all have ended, or the rest have had their time to.

        Once the run trains, the others go on without a node that fails, as the coordinator decides. Before that they
        may take as long as it takes to find that out. What is left without a coordinator, or without nodes, has only
        `GRACE_S`.
        """
        ends_s = [child.ended_s for child in self._all() if child.ended_s is not None]
        if not ends_s or len(ends_s) == len(self._all()):
            return bool(ends_s)
        now = time.monotonic()
        assert self._coordinator is not None
        alone = not self._coordinator.running or not any(node.running for node in self._nodes)
        failed = any(child.failed for child in self._all())
        patience_s = self._config.coordinator.heartbeat_timeout_s + GRACE_S
        if failed and self._has_begun and not alone:
            self._warn_of_failed()
            return False
        late = failed and not self._has_begun and now - min(ends_s) > patience_s
        return late or (alone and now - max(ends_s) > GRACE_S)

    def _bring_back(self) -> None:
        """Start the coordinator again where it was killed: it goes on with the nodes, which wait for it."""
        lost = self._coordinator
        killed = lost is not None and lost.code is not None and lost.code < 0
        if killed and self._has_begun and self._restarts < MOST_RESTARTS and any(node.running for node in self._nodes):
            assert lost is not None
            self._restarts += 1
            log.warning("%s; starting it again", lost.describe())
            name = f"coordinator-{self._restarts + 1}"
            self._coordinator = self._spawn(name, "coordinator", str(self._folder / CONFIG))

    def _warn_of_failed(self) -> None:
        for node in self._nodes:
            if node.failed and node.name not in self._told:
                self._told.add(node.name)
                log.warning("%s; the others go on if the coordinator lets them", node.describe())

    def _all(self) -> list[Child]:
        return [*self._nodes, *([self._coordinator] if self._coordinator else [])]

    def _processes(self, node: str) -> list[tuple[str, dict[str, str]]]:
        """The names of a node's processes, and what torchrun would set in the environment of each."""
        size = self._config.coordinator.layout.columns
        if size == 1:
            return [(node, {})]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return [(f"{node}.{rank}", common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]

    def _spawn(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Child:
        command = [sys.executable, "-m", "node.cli", *arguments]
        log_path = self._folder / LOGS / f"{name}.log"
        whole = self._environment | (environment or {})
        return self._children.start(name, command, log_path=log_path, environment=whole)

    def _await_address(self, coordinator: Child) -> str:
        path = self._folder / ADDRESS
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if path.exists() and (address := path.read_text()).endswith("\n"):
                return address.strip()
            if coordinator.wait(0.02):
                self._raise_failures()
                raise RunAborted(f"the coordinator ended before it listened; its log is {coordinator.log_path}")
        raise RunAborted(
            f"the coordinator did not listen within {START_TIMEOUT_S:g} s; its log is {coordinator.log_path}"
        )

    def _raise_failures(self) -> None:
        """Raise what the process says that failed first. Its log's last lines are shown before that."""
        logs = self._folder / LOGS
        if not logs.is_dir():
            raise RunAborted(f"{self._folder} was deleted or moved while the run went on")
        if self._coordinator is not None and self._coordinator.code == 0:
            self._warn_of_failed()
            culprit = None  # the run has reached its last step
        else:
            culprit = failed_first(self._all())
        if culprit is None:
            if stuck := [child.name for child in self._all() if child.running]:
                raise RunAborted(f"{', '.join(stuck)} did not end in time and had to be stopped; logs are in {logs}")
            return
        if culprit.code == USER_ERROR and (reason := culprit.reason()):
            raise ConfigError(f"{culprit.name}: {reason}")
        if lines := culprit.tail():
            log.error("the last lines of %s:%s", culprit.log_path, "".join(f"\n    {line}" for line in lines))
        raise RunAborted(f"{culprit.describe()}; logs are in {logs}")


def _free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
