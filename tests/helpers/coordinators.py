"""A coordinator's server and nodes that do not compute, over real endpoints on 127.0.0.1.

Run as a script, this file is one such node: ``python coordinators.py COORDINATOR_ADDRESS NAME``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordinator.client import Session, sender
from coordinator.config import CoordinatorConfig
from coordinator.events import Record
from coordinator.keyring import node_access
from coordinator.messages import (
    COORDINATOR,
    RUN_ID,
    Go,
    Stop,
    control_buffer,
)
from coordinator.plan import RunPlan
from coordinator.records.recorder import Recorder
from coordinator.server import CoordinatorServer, RunOutcome
from netem.endpoint import Endpoint, unique
from netem.errors import IsthmusError
from netem.keys import Access
from netem.limits import Limits
from netem.profile import UNSHAPED, Profile
from netem.schedule import Schedule

BIND = "tcp://127.0.0.1:0"


class Receiver:
    """A node's receiver, for control messages only."""

    session: Session

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return control_buffer(tag, total_bytes, peer)

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.session.on_message(buffer)

    def failed(self, error: IsthmusError) -> None:
        self.session.on_failure(error)


def settings(**changes: Any) -> CoordinatorConfig:
    defaults: dict[str, Any] = {
        "nodes": 3,
        "token": "secret",
        "operator": "boss",
        "join_timeout_s": 30.0,
        "heartbeat_interval_s": 0.2,
        "heartbeat_timeout_s": 2.0,
        "return_timeout_s": 0.0,
        "step_timeout_s": 30.0,
    }
    return CoordinatorConfig(**(defaults | changes))


def node_endpoint(
    name: str, config: CoordinatorConfig, receiver: Any, profile: Profile = UNSHAPED
) -> tuple[Endpoint, Access, str]:
    """A node's endpoint, what it proves itself by, and the coordinator's public key."""
    access, lead = node_access(config, BIND)
    limits = Limits(max_strangers=0)
    wire_name = unique(name, access.pair.public)
    return Endpoint(wire_name, RUN_ID, profile, receiver, bind=BIND, limits=limits, access=access), access, lead


@contextmanager
def node(address: str, name: str, config: CoordinatorConfig) -> Iterator[tuple[Session, Endpoint]]:
    """A node's endpoint and session, closed in good order."""
    receiver = Receiver()
    endpoint, access, lead = node_endpoint(name, config, receiver)
    session = Session(
        config,
        sender(endpoint),
        run="test-run",
        name=name,
        address=endpoint.address,
        config_digest="cfg",
        access=access,
    )
    receiver.session = session
    endpoint.connect(COORDINATOR, address, answers_only=True, key=lead)
    try:
        yield session, endpoint
    finally:
        session.leave()
        endpoint.flush(1.0)
        endpoint.close()


def train(address: str, name: str, config: CoordinatorConfig, pause_s: float = 0.0) -> list[Go]:
    """A trainer that does not compute: it takes part in every step and round, to the end."""
    gos: list[Go] = []
    with node(address, name, config) as (session, endpoint):
        _rank, roster = session.join()
        endpoint.set_generation(roster.generation)
        assert name in [entry.name for entry in roster.members]
        step = 0
        while True:
            metrics = {"loss_sum": 4.0, "tokens": 2.0} if step else {}
            answer = session.ready(step, metrics, {"weights": f"w{step}"})
            if isinstance(answer, Stop):
                return gos
            gos.append(answer)
            time.sleep(pause_s)
            for round_ in answer.rounds:
                session.vote(round_.round_id, True, f"digest-{round_.round_id}")
            step = answer.step + 1
            session.saved(step)


class Swarm:
    """A server on a thread, and what it recorded."""

    def __init__(self, config: CoordinatorConfig, steps: int, folder: Path, profile: Profile = UNSHAPED) -> None:
        self.checkpoints: list[int] = []
        self.records: list[Record] = []
        self._recorder = Recorder(folder)
        self.server = CoordinatorServer(
            config,
            RunPlan(
                run_name="test-run",
                chunks=4,
                steps=steps,
                batch=2,
                config_digest="cfg",
                rounds_for=lambda step: ["weights"],
                schedule=Schedule(profile),
            ),
            record=self._record,
            checkpoint_complete=lambda step, nodes: self.checkpoints.append(step),
        )
        self.address = self.server.address
        self._pool = ThreadPoolExecutor(8)
        self.outcome: Future[RunOutcome] = self._pool.submit(self.server.serve)

    def train(self, name: str, config: CoordinatorConfig, pause_s: float = 0.0) -> Future[list[Go]]:
        return self._pool.submit(train, self.address, name, config, pause_s)

    def close(self) -> None:
        self.server.stop("the test is over")
        self.outcome.result(20)
        self._pool.shutdown()
        self._recorder.close()

    def _record(self, record: Record) -> None:
        self.records.append(record)
        self._recorder.record(record)


@contextmanager
def swarm(config: CoordinatorConfig, steps: int, folder: Path, profile: Profile = UNSHAPED) -> Iterator[Swarm]:
    one = Swarm(config, steps, folder, profile)
    try:
        yield one
    finally:
        one.close()
        assert [thread.name for thread in threading.enumerate() if "heartbeat" in thread.name] == []


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], settings(), pause_s=0.02)
