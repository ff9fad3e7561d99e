"""Averaging in fragments that travel under the steps: equal bits, exact bytes, nothing lost, nothing half applied."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import Coordinator, Session, Still, make_trainer, make_world, train
from helpers.small import VOCAB, schedule_of
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.plan import TAKE
from coordinator.records.folder import checkpoint_folder
from netem.errors import ConfigError, GenerationOver, IsthmusError, PeerLate, RunAborted
from node.config import Config
from node.lab.in_process import go
from node.train.agreed import AgreedWeights
from node.train.averaging import Averager, Flight, RingSum, bytes_sent, flatten
from node.train.fragments import cut
from node.train.from_config import drawn_model, payload_format
from node.train.ring_formats import FLOAT32, RING_FORMATS
from node.train.trainer import Trainer
from node.train.world import build_world

STREAMS: dict[str, Any] = {"steps": 14, "sync_every": 6, "sync_fragments": 2, "sync_delay": 2, "checkpoint_every": 6}
DENSE = {"mode": "dense"}


def streaming(compress: dict[str, Any] | None = None, **settings: Any) -> Config:
    return tiny_config(train={**STREAMS, **settings}, compress=DENSE if compress is None else compress)


def own(trainer: Trainer) -> Tensor:
    return trainer._agreed.own()


def train_over_loop(config: Config, world: Sequence[Sequence[int]], folder: Path) -> tuple[Loop, list[Trainer]]:
    """As `helpers.coordinated.train`, over real wires and inboxes."""
    loop, shared = Loop(config, world), Coordinator(config, world, config.train.steps)

    def work(rank: int, _: ThreadWire) -> Trainer:
        session, trainer = Session(shared, rank), make_trainer(config, loop.payload)
        here = build_world(loop.members[rank], loop.payload, loop.wires[rank], session, folder)
        trainer.run(here, session, Still())
        return trainer

    return loop, run_ranks(len(world), work)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sync_delay": 0},
        {"sync_delay": 3, "sync_format": "int4"},
        {"sync_fragments": 1, "sync_delay": 6},
        {"sync_fragments": 3, "sync_delay": 1, "sync_format": "topk10", "outer_lr": 0.7, "outer_momentum": 0.9},
        {"nonfinite": "skip", "sync_format": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("world", ["3+1", "4"])
def test_all_ranks_agree_to_the_bit_and_end_with_equal_weights(
    settings: dict[str, Any], world: str, tmp_path: Path
) -> None:
    """`coordinated` compares the votes and the weights' digests of all ranks at every barrier."""
    config = streaming({}, **settings)
    _, ended = train(config, WORLDS[world], tmp_path)
    assert all(torch.equal(own(one), own(ended[0])) for one in ended)
    assert all(torch.equal(one._agreed.vector, own(one)) for one in ended)


def test_between_rounds_the_weights_differ_and_what_is_agreed_does_not(tmp_path: Path) -> None:
    _, midway = train(streaming({}), WORLDS["4"], tmp_path, until=6)
    assert all(torch.equal(one._agreed.vector, midway[0]._agreed.vector) for one in midway)
    assert not torch.equal(own(midway[0]), own(midway[1]))


@pytest.mark.parametrize("form", RING_FORMATS)
def test_over_real_wires_a_run_sends_the_bytes_of_the_formula(form: str, tmp_path: Path) -> None:
    """Fragment 1 at step 3, fragment 2 at step 6, and again at 9 and 12; all weights at step 14."""
    config = streaming(sync_format=form)
    loop, trainers = train_over_loop(config, WORLDS["4"], tmp_path)
    assert all(torch.equal(own(one), own(trainers[0])) for one in trainers)
    sizes = {name: tensor.numel() for name, tensor in trainers[0].model.named_parameters()}
    fragments = [sum(sizes[name] for name in names) for names in cut(sizes, 2)]
    closing = RING_FORMATS[form if form in ("float32", "bfloat16") else "float32"]
    for rank, wire in enumerate(loop.wires):
        sent = sum(2 * bytes_sent(size, RING_FORMATS[form], 4, rank) for size in fragments)
        assert wire.sent_bytes["averaging"] == sent + bytes_sent(sum(fragments), closing, 4, rank)
    assert all(inbox._ring_held_bytes == 0 for inbox in loop.inboxes)


def test_over_real_wires_a_run_is_that_over_memory(tmp_path: Path) -> None:
    config = streaming(sync_format="int8")
    _, wired = train_over_loop(config, WORLDS["3+1"], tmp_path)
    _, memory = train(config, WORLDS["3+1"], tmp_path)
    assert all(torch.equal(own(one), own(other)) for one, other in zip(wired, memory, strict=True))


class Agreed:
    def __init__(self) -> None:
        self.votes: list[int] = []

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        self.votes.append(round_id)


def test_agreed_weights_are_mixed_with_what_the_own_have_become_under_way() -> None:
    """By hand, for two nodes: one fragment moves, the other stays."""
    config = streaming()
    first, third = go(config, Assignment(WORLDS["2x2"]), 1), go(config, Assignment(WORLDS["2x2"]), 2)
    (begun,), ended = first.begins, third.rounds[-1]
    assert (begun.kind, begun.round_id) == (ended.kind, ended.round_id) == ("fragment 1 of 2", 24)

    def work(rank: int, wire: ThreadWire) -> tuple[Tensor, Tensor, Tensor]:
        model = drawn_model(config, VOCAB)
        agreed, averager = AgreedWeights(config.train, schedule_of(config), model), Averager(rank, 2, wire, Agreed())
        start = agreed.own()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.25 * (1 + rank)
            agreed.begin(averager, begun, 2)
            for parameter in model.parameters():
                parameter += 1.0 + rank
        agreed.average(averager, ended, 3)
        return start, agreed.vector, agreed.own()

    names = {name: tensor.numel() for name, tensor in drawn_model(config, VOCAB).named_parameters()}
    moved = sum(names[name] for name in cut(names, 2)[0])
    for rank, (start, vector, weights) in enumerate(run_ranks(2, work)):
        torch.testing.assert_close(vector[:moved], start[:moved] + 0.375)
        own_now = start[:moved] + 0.25 * (1 + rank) + 1.0 + rank
        torch.testing.assert_close(weights[:moved], 0.5 * vector[:moved] + 0.5 * own_now)
        assert torch.equal(vector[moved:], start[moved:])
        torch.testing.assert_close(weights[moved:], start[moved:] + 0.25 * (1 + rank) + 1.0 + rank)


@pytest.mark.parametrize("settings", [{}, {"sync_format": "topk10", "outer_momentum": 0.9}, {"sync_delay": 0}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    config = streaming(**settings)
    whole, straight = train(config, WORLDS["3+1"], tmp_path)
    for start in (6, 12):
        rest, resumed = train(config, WORLDS["3+1"], tmp_path, start=start)
        assert rest.losses() == whole.losses()[start:]
        assert all(torch.equal(own(one), own(other)) for one, other in zip(resumed, straight, strict=True))


def test_a_checkpoint_has_the_agreed_weights_for_all_and_each_node_its_own(tmp_path: Path) -> None:
    config = streaming()
    _, trainers = train(config, WORLDS["4"], tmp_path, until=6)
    folder, names = checkpoint_folder(tmp_path, 6), trainers[0]._agreed._order
    model = load_file(folder / "model.safetensors")
    assert torch.equal(flatten(model[name] for name in names), trainers[0]._agreed.vector)
    for rank, trainer in enumerate(trainers):
        mine = load_file(folder / f"node-{rank}.safetensors")
        assert torch.equal(flatten(mine[name] for name in names), own(trainer))
        assert torch.equal(mine["outer.agreed"], model_vector := trainer._agreed.vector)
        assert not torch.equal(own(trainer), model_vector)
    (folder / "node-0.safetensors").write_bytes((checkpoint_folder(tmp_path, 6) / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"outer\.agreed is missing, train\.sync_fragments wants"):
        train(config, WORLDS["1"], tmp_path, start=6)


def test_an_aborted_fragment_leaves_all_as_it_was(tmp_path: Path) -> None:
    config = streaming(sync_format="int4", outer_momentum=0.9)
    shared = Coordinator(config, WORLDS["1"], 14)

    def work(rank: int, wire: ThreadWire) -> None:
        payload = payload_format(config)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS["1"], wire, Session(shared, rank), tmp_path)
        for done in range(8):
            trainer.step(here, go(config, Assignment(WORLDS["1"]), done))
        agreed = trainer._agreed
        assert agreed.outer.velocity is not None and agreed.residual is not None  # noqa: PT018
        kept = [agreed.vector.clone(), agreed.outer.velocity.clone(), agreed.residual.clone()]

        def against(_: object, round_id: int, *__: object) -> None:
            if round_id == ninth.rounds[0].round_id:
                return
            raise RunAborted("step 8, averaging of fragment 1 of 2: node-1 could not take part")

        here.averager._session = type("Session", (), {"vote": against})()
        ninth = go(config, Assignment(WORLDS["1"]), 8)
        assert [entry.kind for entry in ninth.rounds] == [TAKE, "fragment 1 of 2"]
        with pytest.raises(RunAborted, match="fragment 1 of 2"):
            trainer.step(here, ninth)
        now = [agreed.vector, agreed.outer.velocity, agreed.residual]
        assert all(torch.equal(*pair) for pair in zip(now, kept, strict=True))

    run_ranks(1, work)


def sent_on_its_way(loop: Loop, rank: int, round_id: int = 9) -> tuple[Averager, Flight]:
    averager = Averager(rank, 2, loop.wires[rank], Agreed())
    return averager, averager.begin(round_id, torch.full((10,), 1.0 + rank), FLOAT32)


def test_a_fragment_travels_while_the_trainer_goes_on() -> None:
    """One thread is the trainer of both nodes, so that neither `begin` can have waited for the other node."""
    loop = Loop(tiny_config(), WORLDS["2x2"])
    (ann, one), (bob, two) = sent_on_its_way(loop, 0), sent_on_its_way(loop, 1)
    found: list[RingSum] = [ann.finish(9, one), bob.finish(9, two)]
    assert all(torch.equal(result.total, torch.full((10,), 3.0)) for result in found)
    assert not any(thread.name.startswith("averaging-9") for thread in threading.enumerate() if thread.is_alive())


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda inbox: inbox.abort(RunAborted("node-1 was lost")), RunAborted),
        (lambda inbox: inbox.announce(2), GenerationOver),
    ],
    ids=["lost", "generation"],
)
def test_a_fragment_under_way_ends_with_the_run_and_with_the_generation(end: Any, error: type[IsthmusError]) -> None:
    """The other node never begins. The trainer hears of it where it would apply the fragment; `close` needs nobody."""
    loop = Loop(tiny_config(), WORLDS["2x2"])
    (ann, one), (closed, two) = sent_on_its_way(loop, 0), sent_on_its_way(loop, 0, 10)
    end(loop.inboxes[0])
    with pytest.raises(error):
        ann.finish(9, one)
    assert not ann._session.votes  # type: ignore[attr-defined]
    closed.close()
    assert isinstance(two.ring.exception(timeout=0), error)


def test_a_fragment_under_way_has_a_deadline() -> None:
    loop = Loop(tiny_config(), WORLDS["2x2"], timeout_s=0.05)
    ann, one = sent_on_its_way(loop, 0)
    with pytest.raises(PeerLate, match=r"waited 0\.05 s for hop 0 of averaging round 9 from node-1"):
        ann.finish(9, one)


def test_what_was_under_way_in_an_older_generation_counts_for_nothing(tmp_path: Path) -> None:
    """The next generation's coordinator begins the fragment anew, at a later step."""
    config = streaming()
    shared = Coordinator(config, WORLDS["1"], 14)

    def work(rank: int, wire: ThreadWire) -> None:
        payload, session = payload_format(config), Session(shared, rank)
        trainer = make_trainer(config, payload)
        here = make_world(payload, WORLDS["1"], wire, session, tmp_path)
        for done in range(2):
            trainer.step(here, go(config, Assignment(WORLDS["1"]), done))
        assert trainer._agreed._begun is not None
        trainer.settle(2)
        shared.until = 2
        trainer.run(here, session, Still())
        assert trainer._agreed._begun is None

    run_ranks(1, work)


def test_layers_are_dealt_by_strides_and_the_rest_evens_out() -> None:
    sizes = {"embed_tokens.weight": 50, "layers.0.a": 4, "layers.0.b": 6, "layers.1.a": 10, "layers.2.a": 10}
    sizes |= {"norm.weight": 3, "lm_head.weight": 20}
    assert cut(sizes, 2) == [
        ["layers.0.a", "layers.0.b", "layers.2.a", "norm.weight", "lm_head.weight"],
        ["embed_tokens.weight", "layers.1.a"],
    ]
    assert cut(sizes, 1) == [list(sizes)]
