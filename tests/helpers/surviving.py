"""Whole runs in one process that lose nodes: the real coordinator's machine, sessions, inboxes, wires and trainers.

Nodes are threads, and their messages are handed over in memory. A node dies at a given point: it says nothing more, and
the coordinator is told that the transport has lost it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from coordinator.assignment import Assignment
from coordinator.client import Session
from coordinator.config import CoordinatorConfig
from coordinator.events import Event, Fault, Faulted, Finish, PeerLost, Received, Record, Send, Tick
from coordinator.messages import decode_from_node, encode
from coordinator.plan import RunPlan
from coordinator.run import Run
from helpers.coordinated import Still, make_trainer
from helpers.fake_coordinator import config as coordinator_config
from helpers.small import schedule_of
from netem.errors import GenerationOver, ProtocolError
from netem.network import UNSHAPED
from netem.schedule import Schedule
from node.config import Config
from node.exchange.inbox import Inbox, Members
from node.exchange.tags import RingTag, decode_tag
from node.exchange.wire import Wire
from node.train.from_config import payload_format
from node.train.trainer import Trainer
from node.train.world import build_world

WAIT_S = 30.0


class Died(Exception):
    """The node has reached the point at which it dies."""


Point = Callable[[str, int], bool]
"""Whether a node dies now: what it is about to do ("ring" message, "vote", or "voted"), and how often it has done
so before."""


class Hub:
    """The coordinator's machine on a thread of its own."""

    def __init__(self, settings: CoordinatorConfig, plan: RunPlan) -> None:
        self.sessions: dict[str, Session] = {}
        self.records: list[Record] = []
        self.faults: list[Fault] = []
        self.outcome: Finish | None = None
        self._run = Run(settings, plan, time.monotonic())
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        self._events.put(event)

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert self.outcome is not None, "the run did not end"

    def _serve(self) -> None:
        until_s = time.monotonic() + WAIT_S
        while self.outcome is None and time.monotonic() < until_s:
            try:
                event: Event = self._events.get(timeout=0.05)
            except queue.Empty:
                event = Tick()
            try:
                actions = self._run.handle(event, time.monotonic())
            except ProtocolError as error:
                self._events.put(Faulted(error.peer, str(error)))
                continue
            for action in actions:
                if isinstance(action, Send) and action.peer in self.sessions:
                    self.sessions[action.peer].on_message(encode(action.message))
                if isinstance(action, Record):
                    self.records.append(action)
                elif isinstance(action, Fault):
                    self.faults.append(action)
                elif isinstance(action, Finish):
                    self.outcome = action


class Node:
    """One node's life."""

    def __init__(
        self, hub: Hub, config: Config, name: str, inboxes: dict[str, Inbox], dies: Point, folder: Path
    ) -> None:
        self.name, self._hub, self._inboxes, self._dies = name, hub, inboxes, dies
        self._config, self._folder = config, folder
        self._payload = payload_format(config)
        self._done: dict[str, int] = {}
        self._members: Members | None = None
        self.trainer: Trainer = make_trainer(config, self._payload)
        self.session = Session(
            coordinator_config(),
            lambda body: hub.put(Received(name, decode_from_node(body, name))),
            run="run",
            name=name,
            address=f"tcp://{name}:1",
            config_digest="cfg",
        )
        hub.sessions[name] = self.session
        inboxes[name].follow(self.session)

    def live(self) -> Trainer | None:
        """Train to the end; the trainer, or None where the node has died."""
        try:
            for rank, roster in self.session.rosters():
                peers = tuple(entry.peer for entry in roster.members)
                self._members = members = Members(roster.generation, Assignment(roster.assignment), rank, peers)
                self._inboxes[self.name].enter(members)
                wire = Wire(self, self._inboxes[self.name], members, self._payload, WAIT_S) if len(peers) > 1 else None
                world = build_world(members, self._payload, wire, self, self._folder)
                self.trainer.settle(roster.start_step)
                try:
                    self.trainer.run(world, self.session, Still())
                except GenerationOver:
                    pass
                finally:
                    world.averager.close()
        except Died:
            del self._hub.sessions[self.name]
            self._hub.put(PeerLost(self.name, "it was killed"))
            return None
        self.session.leave()
        return self.trainer

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        self._pass("vote")
        self.session.vote(round_id, ok, digest, reason)
        self._pass("voted")

    def send(
        self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, flow: int = 0, timeout_s: float = 0.0
    ) -> None:
        """As an endpoint sends: the message bears this node's name and generation."""
        assert self._members is not None
        if isinstance(decode_tag(tag, self.name), RingTag):
            self._pass("ring")
        inbox, body = self._inboxes[peer], b"".join(buffers)
        room = inbox.admit(self.name, self._members.generation, tag, len(body))
        if room is not None:
            room[:] = body
            inbox.deliver(self.name, self._members.generation, tag, room)

    def _pass(self, what: str) -> None:
        before = self._done.get(what, 0)
        self._done[what] = before + 1
        if self._dies(what, before):
            raise Died


def train_with_losses(
    config: Config, folder: Path, nodes: int, dies: dict[str, Point], **settings: int
) -> tuple[Hub, dict[str, Trainer]]:
    """A run of `nodes` nodes, some of which die; the hub, and the trainers of those that have come to the end."""
    steps = schedule_of(config)
    plan = RunPlan(
        run_name="run",
        chunks=config.model.chunks,
        steps=config.train.steps,
        batch=config.train.batch,
        config_digest="cfg",
        rounds_for=lambda done: steps.rounds(done + 1),
        begins_for=lambda done: steps.begins(done + 1),
        ends_for=lambda done: steps.ends(done + 1),
        lost_with=steps.alone,
        schedule=Schedule(UNSHAPED),
    )
    hub = Hub(coordinator_config(nodes=nodes, **settings), plan)
    names = [f"node-{rank}" for rank in range(nodes)]
    inboxes = {name: Inbox(payload_format(config), ring_cap_bytes=1 << 24) for name in names}
    nobody: Point = lambda what, before: False  # noqa: E731
    lives = [Node(hub, config, name, inboxes, dies.get(name, nobody), folder) for name in names]
    with ThreadPoolExecutor(nodes) as pool:
        ended = list(pool.map(Node.live, lives, timeout=2 * WAIT_S))
    hub.join()
    return hub, {name: trainer for name, trainer in zip(names, ended, strict=True) if trainer is not None}
