"""A whole run of the coordinator's machine and its members' over the fake wire, under faults drawn from a seed.

Each node has a trainer that computes nothing, and keeps what a real one's weights would depend on: which try at which
step it has taken, and which rounds it has applied. Nodes die, are started again, stop and wake, are cut off, say
nonsense, accuse each other, and differ. After every step of the world what is promised is checked (`Node.enter`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from coordinator.events import Action, Finish, Forget, PeerLost, Received, Tick
from coordinator.member import End, Member, State
from coordinator.messages import Failed, Go, Leave, Ready, Roster, Saved, Suspect, Vote
from coordinator.plan import TAKE
from coordinator.run import Phase
from helpers.fake_coordinator import Wire, config, join, plan
from netem.errors import ProtocolError
from netem.names import plain

Try = tuple[int, int]
"""A step, and the generation in which it was computed."""


@dataclass
class Weights:
    """What a node's weights have come from."""

    taken: list[Try] = field(default_factory=list)
    applied: list[int] = field(default_factory=list)  # numbers of rounds

    def copy(self) -> Weights:
        return Weights(list(self.taken), list(self.applied))


class Node:
    """One process: its member's machine, and a trainer as `node.train.trainer` is one."""

    def __init__(self, world: FaultyWorld, peer: str) -> None:
        self.world, self.peer = world, peer
        self.weights = Weights()
        self.known = 0  # the generation that the trainer works in
        self.held: Try | None = None
        self.rounds: list[Any] = []
        self.voted: int | None = None
        self.asked = False  # it waits for a Go
        self.begun = False  # the trainer is in a world
        self.awake_at = 0.0

    @property
    def member(self) -> Member:
        return self.world.wire.members[self.peer]

    def act(self) -> None:
        """What the trainer does next, if anything. It calls as `coordinator.client.Session` would let it."""
        member, world = self.member, self.world
        if self.voted is not None and member.committed == self.voted:  # before anything else: it has happened
            self._apply()
        elif member.ending is not None:
            if member.ending.how is End.EVICTED:
                self.begun = False
                world.say(self, join(plain(self.peer)))
            elif member.state is State.DONE:
                world.say(self, Leave())
        elif member.generation > self.known:
            if member.state is State.RUNNING and self._can_enter():
                self.enter()
        elif not self.begun or member.state in (State.READY, State.VOTED):
            return
        elif self.asked and member.go is not None:
            self._begin(member.go)
        elif self.rounds:
            self.voted = self.rounds[0].round_id
            world.say(self, Vote(round_id=self.voted, ok=True, digest=world.digest(self)))
        else:
            self.asked = True
            reached = self.held[0] if self.held else len(self.weights.taken)
            metrics = {"tokens": 8.0} if self.held else {}
            if world.draw.random() < 0.1:
                world.say(self, Saved(step=len(self.weights.taken)))
            world.say(self, Ready(step=reached, metrics=metrics, digests={"weights": world.digest(self)}))

    def _can_enter(self) -> bool:
        """Who joins waits for one that has the weights."""
        roster = self.member.roster
        assert roster is not None
        joins = any(entry.joins for entry in roster.members if entry.peer == self.peer)
        return not joins or roster.generation in self.world.entered

    def enter(self) -> None:
        """A generation begins. Members of the one before come in with the same weights, or the protocol has failed."""
        roster = self.member.roster
        assert roster is not None
        (own,) = [entry for entry in roster.members if entry.peer == self.peer]
        if self.held is not None and self.held[0] == roster.start_step:
            self.weights.taken.append(self.held)
        self.held, self.voted, self.asked, self.rounds = None, None, False, []
        self.known, self.begun = roster.generation, True
        if own.joins:
            self.weights = self.world.entered[roster.generation].copy()
        self.world.check(self, roster)

    def _begin(self, go: Go) -> None:
        """A step, up to its first vote."""
        self.asked = False
        if self.held is not None:
            assert self.held[0] == go.step
            self.weights.taken.append(self.held)
            self.held = None
        assert len(self.weights.taken) == go.step
        self.rounds = list(go.rounds)
        if not go.tail:
            self.held = (go.step + 1, self.known)

    def _apply(self) -> None:
        done = self.rounds.pop(0)
        assert done.round_id == self.voted
        self.voted = None
        self.weights.applied.append(done.round_id)
        if done.kind == TAKE:
            assert self.held is not None
            self.weights.taken.append(self.held)
            self.held = None


class FaultyWorld:
    """One run under the faults of one seed. Faults stop after `faulty_turns`; then all that is left must end."""

    def __init__(self, seed: int, faulty_turns: int = 150) -> None:
        self.draw = random.Random(seed)
        self.faulty_turns = faulty_turns
        nodes = self.draw.choice([1, 2, 3, 3, 4, 4])
        every = self.draw.choice([1, 2, 3])
        kinds = self.draw.choice([[], ["gradients"], [TAKE], [TAKE, "weights"], ["gradients", TAKE, "a", "b"]])
        streams = self.draw.random() < 0.3
        steps = self.draw.choice([3, 5, 8])

        def rounds_for(step: int) -> list[str]:
            found = kinds if step % every == 0 else []
            return [*found, TAKE] if step == steps - 1 and TAKE not in found else found

        self.wire = FaultyWire(
            config(
                nodes=nodes,
                min_nodes=self.draw.randint(1, nodes),
                max_retries_per_step=self.draw.choice([0, 5, 30, 30]),
                step_timeout_s=30.0,
                progress_timeout_s=300.0,
            ),
            plan(
                steps=steps,
                rounds_for=rounds_for,
                begins_for=lambda step: ["f"] if streams and step % 3 == 1 else [],
                ends_for=lambda step: ["f"] if streams and step % 3 == 2 else [],
            ),
        )
        self.nodes: dict[str, Node] = {}
        self.rosters: dict[int, Roster] = {}
        self.entered: dict[int, Weights] = {}
        self.mischief = self.draw.choice([0.01, 0.03, 0.1])
        self.happened: list[str] = []
        self._started = 0
        for rank in range(nodes):
            self.start(f"node-{rank}")

    def start(self, name: str) -> None:
        """A process of this name is started."""
        self._started += 1
        peer = f"{name}~{self._started:x}"
        self.nodes[peer] = Node(self, peer)
        self.wire.enter(peer)

    def say(self, node: Node, message: Any) -> None:
        self.wire.say(node.peer, message)

    def digest(self, node: Node) -> str:
        """What a node says its weights are; now and then something else."""
        wrong = self._is_faulty and self.draw.random() < self.mischief / 5
        return self.draw.choice("xyz") if wrong else str(len(node.weights.taken))

    def check(self, node: Node, roster: Roster) -> None:
        """Safety: one roster a generation, and all who come into it have the very same past."""
        assert self.rosters.setdefault(roster.generation, roster) == roster
        assert [step for step, _ in node.weights.taken] == list(range(1, roster.start_step + 1)), node.weights
        before = self.entered.setdefault(roster.generation, node.weights.copy())
        assert node.weights == before, (node.peer, node.weights, before)

    # The course of the world.

    @property
    def _is_faulty(self) -> bool:
        return self.faulty_turns > 0

    def go(self) -> None:
        """Live to the end of the run. Liveness: it comes, with or without success."""
        while self._is_faulty and self.wire.outcome is None:
            self.faulty_turns -= 1
            self._turn()
            if self.draw.random() < self.mischief:
                self._fault()
        self.faulty_turns = 0
        for node in self.nodes.values():
            node.awake_at = 0.0
        self.wire.cut.clear()
        turns = 0
        while self.wire.outcome is None:
            turns += 1
            assert turns < 5000, f"nothing comes to an end; phase {self.wire.run.phase}"
            self._turn()
        for node in self.living():
            for _ in range(200):
                self._deliver(node)
                node.act()

    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.peer not in self.wire.dead]

    def _turn(self) -> None:
        """Something happens somewhere: a delivery, a move of a trainer, or only time."""
        awake = [node for node in self.living() if node.awake_at <= self.wire.now_s]
        for node in self.draw.sample(awake, k=len(awake)):
            move = self.draw.random()
            if move < 0.5:
                self._deliver(node)
            elif move < 0.9:
                node.act()
        self.wire.now_s += self.draw.choice([0.05, 0.05, 0.05, 1.0] if self._is_faulty else [0.05, 0.2])
        if self.draw.random() < 0.3 or not awake:
            self.wire.now_s += 0.0 if awake else 1.0
            for node in awake:
                self.wire._put(node.peer, node.member.tick(self.wire.now_s))
            self.wire.tick_coordinator()

    def _deliver(self, node: Node) -> None:
        wire, peer = self.wire, node.peer
        if (peer, "up") not in wire.cut:
            while wire.up[peer] and wire.outcome is None:
                wire.deliver_up(peer)
        if (peer, "down") not in wire.cut:
            for _ in range(self.draw.randint(1, 4)):
                if wire.down[peer]:
                    wire.deliver_down(peer)

    def _fault(self) -> None:
        living = self.living()
        if not living:
            return
        node = self.draw.choice(living)
        faults = [
            self._kill,
            self._restart,
            self._restart,
            self._stop,
            self._stop,
            self._cut,
            self._accuse,
            self._fail,
            self._transport,
        ]
        fault = self.draw.choice([*faults, self._nonsense, self._stale])
        self.happened.append(f"{self.wire.now_s:.1f} {fault.__name__} {node.peer}")
        fault(node)

    def _kill(self, node: Node) -> None:
        self.wire.kill(node.peer)

    def _restart(self, node: Node) -> None:
        self.wire.kill(node.peer)
        self.start(plain(node.peer))

    def _stop(self, node: Node) -> None:
        node.awake_at = self.wire.now_s + self.draw.choice([2.0, 8.0, 15.0, 45.0])

    def _cut(self, node: Node) -> None:
        way = (node.peer, self.draw.choice(["up", "down"]))
        if way in self.wire.cut:
            self.wire.cut.remove(way)
        else:
            self.wire.cut.add(way)

    def _accuse(self, node: Node) -> None:
        accused = self.draw.choice(list(self.nodes))
        if node.member.state in (State.RUNNING, State.READY, State.VOTED):
            self.say(node, Suspect(peer=accused, reason="waits in vain"))

    def _fail(self, node: Node) -> None:
        if node.member.state is not State.GONE:
            self.say(node, self.draw.choice([Leave(), Failed(reason="out of memory")]))
            self.wire.dead.add(node.peer)

    def _transport(self, node: Node) -> None:
        self.wire.event(PeerLost(node.peer, "has not answered"))

    def _nonsense(self, node: Node) -> None:
        generation = self.wire.run._generations.number
        if node.peer in self.wire.run.membership and self.wire.run.phase is not Phase.JOINING:
            self.wire.event(Received(node.peer, Ready(step=77, generation=generation + self.draw.choice([0, 1]))))

    def _stale(self, node: Node) -> None:
        """A message of an older generation arrives late: nothing may follow from it."""
        older = self.wire.run._generations.number - 1
        if older > 0 and node.peer in self.wire.run.membership:
            before = (self.wire.run.step, self.wire.run.phase)
            message = self.draw.choice(
                [
                    Ready(step=self.wire.run.step, generation=older),
                    Vote(round_id=0, ok=False, generation=older),
                    Suspect(peer=node.peer, reason="x", generation=older),
                ]
            )
            if self.wire.run.phase is not Phase.FINISHED:
                assert self.wire.event(Received(node.peer, message)) == []
                assert (self.wire.run.step, self.wire.run.phase) == before


class FaultyWire(Wire):
    """A wire that may be cut in one way or both, where a forgotten peer's messages are dropped, and where a member that
    hears nonsense gives up, as `coordinator.client.Session` makes it."""

    def __init__(self, *arguments: Any) -> None:
        self.cut: set[tuple[str, str]] = set()
        super().__init__(*arguments)

    def deliver_down(self, name: str) -> None:
        try:
            super().deliver_down(name)
        except ProtocolError as error:
            raise AssertionError(f"{name} was told what it cannot take: {error}") from error

    def tick_coordinator(self) -> None:
        self.event(Tick())

    def _do(self, action: Action) -> None:
        if isinstance(action, Forget):
            self.down[action.peer].clear()
        super()._do(action)


def gone(world: FaultyWorld, seed: int) -> Finish:
    """Let `world` go to its end; how its run ended. A violation is told with its seed and all that happened."""
    try:
        world.go()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(world.happened)) from error
    outcome = world.wire.outcome
    assert outcome is not None
    return outcome
