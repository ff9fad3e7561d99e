"""A local run under chaos: its processes, the doors before its nodes, and what happens to them when.

Each node listens on a port of its own and tells its peers that of its door. What ends, because it was killed or gave
up, is started again as it was, as a supervisor on a real machine would do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from coordinator.records.folder import CONFIG, LOGS, METRICS
from coordinator.records.follow import Follower
from coordinator.records.rates import Record
from netem.children import Child, Children
from netem.errors import RunAborted
from node.config import TOKEN_VARIABLE, Config, save_config
from node.lab.chaos import hang
from node.lab.chaos.schedule import COORDINATOR, ON_THE_WIRE, Disturbance, Kind

log = logging.getLogger("isthmus.chaos")

START_S = 120.0
ANSWER_S = 20.0
TICK_S = 0.05
SLOW_PERIOD_S = 0.25
SLOW_SHARE = 0.2
STILL_S = 5.0
"""Where this process does nothing for so long, it was stopped."""
AGAIN_S = 2.0
"""A process that has ended by itself is started again after this time."""
SAMPLE_S = 10.0


class Sample(NamedTuple):
    """What one process holds at a time."""

    at_s: float
    process: str
    rss_bytes: int
    threads: int
    files: int
    """Descriptors of all kinds, sockets among them."""
    sockets: int
    pid: int


class Outcome(NamedTuple):
    """A run under chaos, as it was seen from outside. Times count from the first recorded step."""

    records: list[tuple[float, Record]]
    done: list[Disturbance]
    samples: list[Sample]
    restarts: Counter[str]
    ended: str
    """Why it ended before its time; "" where it did not."""
    stood_s: float = 0.0
    """For how long all of it was stopped, which no other time counts."""
    lasted_s: float = math.inf


class Chaos:
    """The run's processes. `Children` of the caller ends them in any case."""

    def __init__(self, config: Config, children: Children) -> None:
        self._config = config
        self._children = children
        self._folder = config.run.folder
        token = config.coordinator.token or secrets.token_urlsafe(24)
        self._environment = os.environ | {TOKEN_VARIABLE: token, hang.VARIABLE: "1"}
        self._address = f"tcp://127.0.0.1:{_free_port()}"
        self._ports = {name: _free_port() for name in self.names}
        self._doors: dict[str, Child] = {}
        self._entrances: dict[str, int] = {}
        self._processes: dict[str, Child] = {}
        self._down_until_s: dict[str, float] = {}
        self._slow: set[str] = set()
        self.restarts: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The nodes."""
        return [f"node-{rank}" for rank in range(self._config.coordinator.nodes)]

    def start(self) -> None:
        """Start doors, coordinator and nodes."""
        save_config(self._config, self._folder / CONFIG)
        (self._folder / LOGS).mkdir(exist_ok=True)
        for name in self.names:
            command = [sys.executable, "-m", "node.lab.chaos.door", str(self._ports[name])]
            door = self._children.start(f"door of {name}", command, log_path=self._log(f"door-{name}"), talks=True)
            self._doors[name] = door
            self._entrances[name] = json.loads(door.hear(ANSWER_S))["port"]
        for name in (COORDINATOR, *self.names):
            self._launch(name)

    def begin(self, one: Disturbance) -> None:
        """Let it happen."""
        match one.kind:
            case Kind.KILL | Kind.LEADER:
                self._down_until_s[one.victim] = time.monotonic() + one.lasts_s
                self._signal(one.victim, signal.SIGKILL)
            case Kind.STOP:
                self._signal(one.victim, signal.SIGSTOP)
            case Kind.HANG:
                self._signal(one.victim, hang.HANG)
            case Kind.SLOW:
                self._slow.add(one.victim)
            case _:
                assert one.kind in ON_THE_WIRE
                self._doors[one.victim].tell(json.dumps({"kind": one.kind, "seed": int(1e3 * one.at_s)}).encode())

    def end(self, one: Disturbance) -> None:
        """Let it be over."""
        if one.kind in ON_THE_WIRE:
            self._doors[one.victim].tell(b'{"kind": null}')
        elif one.kind in (Kind.STOP, Kind.SLOW):
            self._slow.discard(one.victim)
            self._signal(one.victim, signal.SIGCONT)
        elif one.kind is Kind.HANG:
            self._signal(one.victim, hang.GO_ON)

    def tick(self, now_s: float) -> None:
        """Keep slow processes slow, and start again what has ended."""
        awake = now_s % SLOW_PERIOD_S < SLOW_SHARE * SLOW_PERIOD_S
        for name in self._slow:
            self._signal(name, signal.SIGCONT if awake else signal.SIGSTOP)
        for name, process in self._processes.items():
            if process.running:
                continue
            if name not in self._down_until_s:
                log.info("%s", process.describe())
                self._down_until_s[name] = now_s + AGAIN_S
            elif now_s >= self._down_until_s[name]:
                del self._down_until_s[name]
                self.restarts[name] += 1
                self._launch(name)

    def is_over(self) -> bool:
        """Whether the coordinator has ended without having been killed."""
        process = self._processes[COORDINATOR]
        return not process.running and not process.failed

    def sample(self, at_s: float) -> list[Sample]:
        """What each process holds."""
        found = []
        for name, process in self._processes.items():
            try:
                seen = psutil.Process(process.pid)
                with seen.oneshot():
                    held = seen.memory_info().rss, seen.num_threads(), seen.num_fds(), len(seen.net_connections())
            except psutil.Error:
                continue
            found.append(Sample(at_s, name, *held, process.pid))
        return found

    def _launch(self, name: str) -> None:
        command = [sys.executable, "-m", "node.cli"]
        if name == COORDINATOR:
            command += ["coordinator", str(self._folder / CONFIG), f"--coordinator.address={self._address}"]
        else:
            command += ["node", str(self._folder / CONFIG), "--join", self._address, "--name", name]
            command += ["--bind", f"tcp://127.0.0.1:{self._ports[name]}"]
            command += ["--advertise", f"127.0.0.1:{self._entrances[name]}"]
        self._processes[name] = self._children.start(
            name, command, log_path=self._log(name), environment=self._environment
        )

    def _log(self, name: str) -> Path:
        return self._folder / LOGS / f"{name}.log"

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes[name]
        if process.running:
            os.kill(process.pid, number)


class _Course:
    """What has been seen of a run so far, and what is still to happen to it."""

    def __init__(self, chaos: Chaos, schedule: list[Disturbance], say: Callable[[str], None]) -> None:
        self._chaos = chaos
        self._say = say
        self._waiting = list(schedule)
        self._under_way: list[Disturbance] = []
        self._sampled_s = -SAMPLE_S
        self.at_s = self.stood_s = 0.0
        self.done: list[Disturbance] = []
        self.samples: list[Sample] = []

    def advance(self, since_s: float) -> None:
        """So much time has passed since the first step, with all stops of this very process."""
        now_s = since_s - self.stood_s
        if now_s - self.at_s > STILL_S:  # it was stopped, and what was to happen meanwhile happens later
            self._say(f"{self.at_s:6.1f} s  stood still for {now_s - self.at_s:.0f} s")
            self.stood_s += now_s - self.at_s
        else:
            self.at_s = now_s
        for one in [one for one in self._under_way if self.at_s >= one.until_s]:
            self._chaos.end(one)
            self._under_way.remove(one)
        for one in [one for one in self._waiting if self.at_s >= one.at_s]:
            self._say(str(one))
            self._chaos.begin(one)
            self._waiting.remove(one)
            self._under_way.append(one)
            self.done.append(one)
        self._chaos.tick(time.monotonic())
        if self.at_s - self._sampled_s >= SAMPLE_S:
            self.samples += self._chaos.sample(self.at_s)
            self._sampled_s = self.at_s

    def end(self) -> None:
        """Let all be over that is under way."""
        for one in self._under_way:
            self._chaos.end(one)


def drive(
    config: Config, schedule: list[Disturbance], duration_s: float, say: Callable[[str], None] = log.info
) -> Outcome:
    """Run for `duration_s` from the first step on, or until Ctrl-C, under this schedule. Raises `RunAborted` where no
    step is done."""
    with Children() as children:
        chaos = Chaos(config, children)
        chaos.start()
        follower = Follower(config.run.folder / METRICS)
        records: list[tuple[float, Record]] = [(0.0, record) for record in _first_record(follower, chaos)]
        began_s = time.monotonic()
        course, ended = _Course(chaos, schedule, say), ""
        try:
            while course.at_s < duration_s and not ended:
                course.advance(time.monotonic() - began_s)
                records += [(course.at_s, record) for record in follower.read()]
                ended = "the coordinator has ended the run" if chaos.is_over() else ""
                time.sleep(TICK_S)
            course.end()
        except KeyboardInterrupt:
            ended = f"interrupted after {course.at_s:.0f} s"
        return Outcome(records, course.done, course.samples, chaos.restarts, ended, course.stood_s, course.at_s)


def _first_record(follower: Follower, chaos: Chaos) -> list[Record]:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if found := follower.read():
            return list(found)
        chaos.tick(time.monotonic())
        time.sleep(TICK_S)
    raise RunAborted(f"no step was done within {START_S:g} s; logs are in the run's folder")


def _free_port() -> int:
    """A port that is free now. Another process may take it before it is used; then the run says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
