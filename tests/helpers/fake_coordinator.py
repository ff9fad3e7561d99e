"""A coordinator and its members joined by a fake wire and a hand-turned clock, for the tests of the protocol.

Messages pass as bytes through first-in-first-out queues, one pair a node; the test decides what is delivered when.
A killed member neither speaks, hears nor ticks any more.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from coordinator.config import CoordinatorConfig
from coordinator.events import (
    Action,
    CheckpointComplete,
    CheckpointFailed,
    Event,
    Fault,
    Faulted,
    Finish,
    Follow,
    Received,
    Record,
    Say,
    Send,
    Tick,
)
from coordinator.member import End, Member, State
from coordinator.messages import (
    PROTOCOL_VERSION,
    CoordinatorMessage,
    Join,
    Leave,
    NodeMessage,
    Ready,
    Vote,
    decode_from_coordinator,
    decode_from_node,
    encode,
)
from coordinator.plan import RunPlan
from coordinator.run import Phase, Run
from netem.errors import ProtocolError
from netem.names import plain
from netem.network import UNSHAPED
from netem.schedule import Schedule


def config(**changes: Any) -> CoordinatorConfig:
    defaults: dict[str, Any] = {
        "nodes": 2,
        "token": "t",
        "join_timeout_s": 60.0,
        "heartbeat_interval_s": 1.0,
        "heartbeat_timeout_s": 10.0,
        "return_timeout_s": 0.0,
        "step_timeout_s": 100.0,
        "progress_timeout_s": 1000.0,
    }
    return CoordinatorConfig(**(defaults | changes))


def plan(**changes: Any) -> RunPlan:
    defaults: dict[str, Any] = {
        "run_name": "run",
        "chunks": 4,
        "steps": 3,
        "batch": 2,
        "config_digest": "cfg",
        "rounds_for": lambda step: [],
        "schedule": Schedule(UNSHAPED),
    }
    return RunPlan(**(defaults | changes))


def join(name: str, **changes: Any) -> Join:
    defaults: dict[str, Any] = {
        "name": name,
        "version": PROTOCOL_VERSION,
        "run": "run",
        "config_digest": "cfg",
        "address": f"tcp://127.0.0.1:{5000 + sum(name.encode()) * 7 % 1000}-{name}",
        "host": "atlas",
        "pid": 7,
    }
    return Join(**(defaults | changes))


class Wire:
    """One run, its members, and the messages on their way between them."""

    def __init__(self, settings: CoordinatorConfig, run_plan: RunPlan) -> None:
        self.now_s = 0.0
        self.config = settings
        self.plan = run_plan
        self.run = Run(settings, run_plan, 0.0)
        self.members: dict[str, Member] = {}
        self.up: dict[str, deque[bytes]] = {}
        self.down: dict[str, deque[bytes]] = {}
        self.dead: set[str] = set()
        self.heard: dict[str, list[CoordinatorMessage]] = {}
        self.records: list[Record] = []
        self.checkpoints: list[int] = []
        self.told: list[Fault] = []
        self.said: list[str] = []
        self.outcome: Finish | None = None
        self.network: Follow | None = None
        self.answers: dict[str, list[CoordinatorMessage]] = {}
        self.faults: list[ProtocolError] = []

    def enter(self, name: str, **changes: Any) -> None:
        """A new node asks to join."""
        self.members[name] = Member(self.config)
        self.up[name], self.down[name], self.heard[name] = deque(), deque(), []
        self.say(name, join(plain(name), **changes))

    def say(self, name: str, message: NodeMessage) -> None:
        """A node's own machine sends."""
        self._put(name, self.members[name].send(message, self.now_s))

    def inject(self, name: str, message: NodeMessage) -> list[Action]:
        """A node sends a message that its own machine did not make."""
        return self.event(Received(name, message))

    def event(self, event: Event) -> list[Action]:
        """Hand an event to the coordinator's machine and carry out its actions, as the server does."""
        done: list[Action] = []
        pending = deque([event])
        while pending and self.outcome is None:
            try:
                actions = self.run.handle(pending.popleft(), self.now_s)
            except ProtocolError as error:
                self.faults.append(error)
                pending.append(Faulted(error.peer, str(error)))
                continue
            for action in actions:
                self._do(action)
            done += actions
        return done

    def deliver_up(self, name: str) -> None:
        """The oldest message of one node reaches the coordinator."""
        self.event(Received(name, decode_from_node(self.up[name].popleft(), name)))

    def deliver_down(self, name: str) -> None:
        """The oldest message to one node reaches it."""
        message = decode_from_coordinator(self.down[name].popleft())
        if name not in self.dead:
            self.heard[name].append(message)
            self.members[name].receive(message, self.now_s)

    def settle(self) -> None:
        """Deliver messages until none is on its way."""
        while any(self.up.values()) or any(self.down.values()):
            for name in self.members:
                while self.up[name]:
                    self.deliver_up(name)
                while self.down[name]:
                    self.deliver_down(name)

    def advance(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass in small steps, with ticks and deliveries on both sides."""
        end_s = self.now_s + seconds
        while self.now_s < end_s and self.outcome is None:
            self.now_s = min(end_s, self.now_s + step_s)
            self.tick()
            self.settle()

    def tick(self) -> None:
        """Let both machines notice the time."""
        for name, member in self.members.items():
            if name not in self.dead:
                self._put(name, member.tick(self.now_s))
        self.event(Tick())

    def kill(self, name: str) -> None:
        """The node dies. What it had not sent yet is lost."""
        self.dead.add(name)
        self.up[name].clear()

    def work(self, name: str) -> bool:
        """Do what a trainer does next, if anything: be ready, vote, or leave. False where there is nothing to do."""
        member = self.members[name]
        if name in self.dead:
            return False
        if member.ending is not None and member.ending.how is End.EVICTED:
            return False
        if member.state is State.DONE:
            self.say(name, Leave())
        elif member.state is State.RUNNING:
            if member._rounds_left:
                self.say(name, Vote(round_id=member._rounds_left[0], ok=True, digest="same"))
            else:
                assert member.roster is not None
                step = member.go.step + (not member.go.tail) if member.go else member.roster.start_step
                metrics = {"tokens": 8.0, "loss_sum": 2.0} if member.go else {}
                self.say(name, Ready(step=step, metrics=metrics))
        else:
            return False
        return True

    def play(self, until: int | None = None) -> None:
        """All trainers work until nobody can, or the coordinator has seen `until` steps done by all."""
        busy = True
        while busy:
            self.settle()
            if until is not None and self.run.step >= until:
                return
            worked = [self.work(name) for name in self.members]
            busy = any(worked)

    def _put(self, name: str, messages: list[NodeMessage]) -> None:
        self.up[name].extend(encode(message) for message in messages)

    def _do(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if peer in self.down:
                    self.down[peer].append(encode(message))
                else:
                    self.answers.setdefault(peer, []).append(decode_from_coordinator(encode(message)))
            case Follow():
                self.network = action
            case Record():
                self.records.append(action)
            case CheckpointComplete(step):
                self.checkpoints.append(step)
            case CheckpointFailed():
                pass  # the server says it in its log
            case Fault():
                self.told.append(action)
            case Say(text):
                self.said.append(text)
            case Finish():
                self.outcome = action


def started(nodes: int = 2, steps: int = 3, settings: dict[str, Any] | None = None, **plan_changes: Any) -> Wire:
    """A world that is complete; the first step is awaited. `settings` are the coordinator's."""
    wire = Wire(config(nodes=nodes, **(settings or {})), plan(steps=steps, **plan_changes))
    for rank in range(nodes):
        wire.enter(f"node-{rank}")
    wire.settle()
    return wire


LOSS_ENDS = {"max_retries_per_step": 0}
"""The settings with which a loss ends the run."""


def in_round(nodes: int = 3, settings: dict[str, Any] | None = None) -> Wire:
    """A complete world in which the first step's round is open."""
    wire = started(nodes=nodes, settings=settings, rounds_for=lambda step: ["weights"])
    for name in wire.members:
        wire.work(name)
    wire.settle()
    assert wire.run.phase is Phase.ROUND
    return wire


def told(wire: Wire, name: str, kind: type) -> list[Any]:
    """The messages of one kind that a node has heard."""
    return [message for message in wire.heard[name] if type(message) is kind]
