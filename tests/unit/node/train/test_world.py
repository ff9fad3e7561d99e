"""One world after another: other members, ranks and chunks, the same trainers, models and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.coordinated import Coordinator, Session, Still, make_trainer, make_world, train
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, Loop, tiny_config

from coordinator.assignment import Assignment
from coordinator.messages import Go, Stop
from netem.errors import GenerationOver
from node.config import Config
from node.lab.in_process import go
from node.train.from_config import payload_format
from node.train.trainer import Trainer
from node.train.world import World, build_world

STEPS = 6
AFTER = {"2, zigzag": ([[0, 3], [1, 2]], (1, 3)), "2, uneven": ([[0], [1, 2, 3]], (2, 0)), "1": ([[0, 1, 2, 3]], (3,))}
"""The second world's chunks by rank, and which nodes of the first have those ranks."""


def exact(mode: str, **train_settings: Any) -> Config:
    return tiny_config(compress=MODES[mode], train={"sync_every": 1, "steps": STEPS, **train_settings})


class PassingSession(Session):
    """A later generation begins where the helper's coordinator would end the run."""

    def ready(self, step: int, *said: Any) -> Go | Stop:
        answer = super().ready(step, *said)
        if isinstance(answer, Stop) and step < STEPS:
            raise GenerationOver("the next roster is here")
        return answer


MakeWorld = Callable[[Session, ThreadWire], World]


def train_in(coordinator: Coordinator, trainers: Sequence[Trainer], make: MakeWorld, start: int = 0) -> list[float]:
    """Train every rank in the coordinator's world, whose roster begins after `start` steps, until the next generation
    or the run's end; the losses."""

    def work(rank: int, wire: ThreadWire) -> None:
        session = PassingSession(coordinator, rank)
        world, ends = make(session, wire), coordinator.until == STEPS
        trainers[rank].settle(start)
        assert trainers[rank].done == start
        if ends:
            trainers[rank].run(world, session, Still())
        else:
            with pytest.raises(GenerationOver):
                trainers[rank].run(world, session, Still())

    run_ranks(len(trainers), work)
    return coordinator.losses()


@pytest.mark.parametrize(
    ("mode", "switch", "after"),
    [
        ("dense", 4, "2, zigzag"),
        ("geodesic", 1, "1"),
        ("geodesic", 3, "2, zigzag"),
        ("geodesic", 4, "2, uneven"),
        ("taylor2, spectral, a basis a head", 2, "2, uneven"),
    ],
)
def test_another_world_goes_on_with_the_same_trainers_as_one_node_would(
    mode: str, switch: int, after: str, tmp_path: Path
) -> None:
    """In the warm start, at its end, after the step that takes the basis, and after compressed ones; c = 1."""
    config = exact(mode)
    one, _ = train(config, WORLDS["1"], tmp_path)
    chunks, survivors = AFTER[after]
    formats = [payload_format(config) for _ in range(4)]
    trainers = [make_trainer(config, payload) for payload in formats]

    def world_of(nodes: Sequence[int], owned: Sequence[Sequence[int]]) -> MakeWorld:
        return lambda session, wire: make_world(formats[nodes[session.rank]], owned, wire, session, tmp_path)

    losses = train_in(Coordinator(config, WORLDS["4"], switch), trainers, world_of(range(4), WORLDS["4"]))
    second = Coordinator(config, chunks, STEPS)
    losses += train_in(second, [trainers[node] for node in survivors], world_of(survivors, chunks), switch)
    off = max(abs(a / b - 1) for a, b in zip(losses, one.losses(), strict=True))
    print(f"losses differ by {off:.1e}")
    assert off < 2e-6
    assert {tuple(sorted(by_step[switch][1])) for by_step in second.said} == {
        ("assignment", "basis", "corpus", "weights")
    }
    assert {by_step[switch][1]["assignment"] for by_step in second.said} == {Assignment(chunks).digest()}


def test_weights_that_differ_are_found_where_a_world_begins(tmp_path: Path) -> None:
    """At c = 1 too, where nothing else compares them."""
    config = exact("dense")
    payload = payload_format(config)
    trainers = [make_trainer(config, payload) for _ in range(2)]

    def make(session: Session, wire: ThreadWire) -> World:
        return make_world(payload, WORLDS["2x2"], wire, session, tmp_path)

    train_in(Coordinator(config, WORLDS["2x2"], 2), trainers, make)
    next(trainers[1].model.parameters()).data[0] += 1e-3
    second = Coordinator(config, WORLDS["2x2"], STEPS)
    with pytest.raises(AssertionError, match="digests differ"):
        train_in(second, trainers, make, start=2)
    assert [list(by_step) for by_step in second.said] == [[2], [2]], "found before a step is done"


@pytest.mark.parametrize("mode", ["dense", "geodesic"])
def test_over_inboxes_a_step_that_a_lost_node_interrupts_is_done_again_in_the_next_world(
    mode: str, tmp_path: Path
) -> None:
    """Real wires and inboxes: the waits of the old world end, and nothing of it is found in the new one."""
    config, lost, switch = exact(mode), 3, 4
    one, _ = train(config, WORLDS["1"], tmp_path)
    loop = Loop(config, WORLDS["4"])
    trainers = [make_trainer(config, loop.payload) for _ in range(4)]

    def make(session: Session, _: ThreadWire) -> World:
        members = loop.members[session.rank]
        return build_world(members, loop.payload, loop.wires[session.rank], session, tmp_path)

    coordinator = Coordinator(config, WORLDS["4"], switch)
    losses = train_in(coordinator, trainers, make)
    loop.begin(2, WORLDS["4"], loop.names)
    for trainer in trainers:
        trainer.settle(switch)

    def interrupted(rank: int, wire: ThreadWire) -> None:
        if rank == lost:
            for inbox in loop.inboxes:
                inbox.announce(3)
            return
        with pytest.raises(GenerationOver, match="generation 2 is over: 3 has begun"):
            trainers[rank].step(make(Session(coordinator, rank), wire), go(config, loop.members[0].assignment, switch))

    run_ranks(4, interrupted)
    assert all(trainer.done == switch for trainer in trainers)
    assert any(inbox._held for inbox in loop.inboxes), "the test should leave something behind"
    chunks, survivors = [[0, 3], [1, 2]], (0, 2)
    loop.begin(3, chunks, [loop.names[node] for node in survivors])
    assert not any(loop.inbox(members)._held for members in loop.members)
    losses += train_in(Coordinator(config, chunks, STEPS), [trainers[node] for node in survivors], make, switch)
    assert losses == pytest.approx(one.losses(), rel=2e-6)


def test_a_rank_without_its_own_share_would_not_train_as_one_node(tmp_path: Path) -> None:
    """The share is the world's: between averagings it scales gradients, and it counts tokens."""
    config = tiny_config(compress=MODES["dense"], train={"sync_every": 3, "steps": STEPS})
    payload = payload_format(config)
    trainer = make_trainer(config, payload)
    shares, tokens = [], []
    for chunks in (WORLDS["1"], WORLDS["3+1"]):
        coordinator = Coordinator(config, chunks, STEPS)

        def work(rank: int, wire: ThreadWire, chunks: Any = chunks, coordinator: Coordinator = coordinator) -> None:
            world = make_world(payload, chunks, wire, Session(coordinator, rank), tmp_path)
            one = trainer if rank == 0 else make_trainer(config, payload)
            metrics = one.step(world, Go(step=3, generation=1, cursor=0))
            if rank == 0:
                shares.append(world.share)
                tokens.append(metrics["tokens"])

        run_ranks(len(chunks), work)
    assert shares == [1.0, 0.75]
    assert tokens == [64, 48]
