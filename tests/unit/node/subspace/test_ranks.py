"""Ranks: by share, or chosen from the spectrum for a budget, on all nodes alike before anything compressed travels."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import Coordinator, Session, Still, make_trainer, train
from helpers.small import VOCAB, contexts, schedule_of
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, full_spec, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.records.folder import checkpoint_folder
from netem.errors import ConfigError, ProtocolError
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassKey, PassSpec
from node.exchange.payload import step_bytes
from node.exchange.tags import ChunkTag, encode_tag
from node.subspace.ranks import Key, RankTable, choose_ranks, rank_table, spectrum
from node.train.averaging import Averager
from node.train.checkpoint import Checkpoints, load_model
from node.train.from_config import drawn_model, payload_format
from node.train.passes import loss_sum
from node.train.trainer import Trainer
from node.train.world import World

BUDGET: dict[str, Any] = {"budget_bytes_per_token": 80.0}
TRAIN = {"sync_every": 2, "checkpoint_every": 2}


def table_of(**compress: Any) -> RankTable:
    config = tiny_config(compress=compress)
    return rank_table(config.model, config.compress)


def test_the_last_layer_has_shares_of_its_own() -> None:
    every = {"dense_last_layers": 0, "last_k_share": 0.7, "last_v_share": 0.5}
    assert list(table_of(**every).ranks.values()) == [3, 6, 3, 6, 5, 8]
    ranks = table_of(**every | {"dense_last_layers": 1}).ranks
    assert ranks == {(0, "k"): 3, (0, "v"): 6, (1, "k"): 3, (1, "v"): 6}
    ranks = table_of(**every | {"remote_last_layers": 2}).ranks
    assert ranks == {(1, "k"): 3, (1, "v"): 6, (2, "k"): 5, (2, "v"): 8}
    payload = payload_format(tiny_config(compress=every))
    assert payload.chunk_bytes(2, PassSpec(8, True)) == 4 * 2 * (8 * (5 + 8) + 2)


def test_a_share_that_leaves_no_room_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"compress\.last_v_share = 0\.3: rotation 'geodesic' wants 22 directions"):
        table_of(dense_last_layers=0, last_v_share=0.3)
    with pytest.raises(ConfigError, match=r"compress\.k_share = 0\.8: leaves rank 3, fewer columns than .* = 4"):
        table_of(generators=4)


def test_a_spectrum_is_the_energy_by_direction_strongest_first() -> None:
    rows = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = spectrum(rows.mT @ rows)
    wanted = torch.linalg.svdvals(rows).square().sum(0)
    torch.testing.assert_close(found, wanted / wanted.sum())


WIDTH = 6
SPECTRA = st.lists(st.lists(st.floats(0, 1), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=4)


@settings(deadline=None)
@given(SPECTRA, st.integers(1, 3), st.integers(0, 40), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_ranks_keep_to_the_budget_and_leave_no_direction_that_would_fit(
    rows: list[list[float]], greatest: int, budget: int, costs: list[int]
) -> None:
    spectra: dict[Key, Tensor] = {(i, "k"): torch.tensor(sorted(row)[::-1]) for i, row in enumerate(rows)}

    def cost(key: Key, rank: int) -> int:
        return 1 + costs[key[0]] * rank

    least_bytes = sum(cost(key, 1) for key in spectra)
    if least_bytes > budget:
        with pytest.raises(ConfigError, match=f"the least that the layers need is {least_bytes} bytes"):
            choose_ranks(spectra, 1, greatest, cost, budget)
        return
    ranks = choose_ranks(spectra, 1, greatest, cost, budget)
    spent = sum(cost(key, rank) for key, rank in ranks.items())
    assert all(1 <= rank <= greatest for rank in ranks.values())
    assert spent <= budget
    assert all(rank == greatest or spent + costs[key[0]] > budget for key, rank in ranks.items())


def test_directions_go_where_they_keep_most_energy_per_byte() -> None:
    spectra = {
        (0, "k"): torch.tensor([0.9, 0.05, 0.03, 0.02]),
        (0, "v"): torch.tensor([0.4, 0.3, 0.2, 0.1]),
        (1, "k"): torch.tensor([0.5, 0.45, 0.04, 0.01]),
    }
    assert choose_ranks(spectra, 1, 4, lambda key, rank: rank, 6) == {(0, "k"): 1, (0, "v"): 3, (1, "k"): 2}
    dear = choose_ranks(spectra, 1, 4, lambda key, rank: rank * (10 if key == (1, "k") else 1), 22)
    assert dear == {(0, "k"): 4, (0, "v"): 4, (1, "k"): 1}


def test_a_budget_that_does_not_reach_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"budget_bytes_per_token = 16: rank 1 in each of 2 layers takes 18"):
        payload_format(tiny_config(compress={"budget_bytes_per_token": 16.0}))
    payload_format(tiny_config(compress={"budget_bytes_per_token": 18.0}))


def test_ranks_are_chosen_once_in_a_round_of_their_own() -> None:
    config = tiny_config(compress=BUDGET | {"refresh_every": 2}, train=TRAIN | {"steps": 8})
    rounds = [schedule_of(config).rounds(step) for step in range(1, 9)]
    assert rounds[2] == ["moments", "ranks", "basis"]
    assert [kinds for kinds in rounds[3:] if "ranks" in kinds] == []
    assert rounds[4][:2] == ["moments", "basis"]
    weights = tiny_config(compress=BUDGET | {"basis": "weights"}, train=TRAIN)
    assert schedule_of(weights).rounds(3) == ["ranks", "basis"]


@pytest.mark.parametrize("rotation", ["geodesic", "fixed"])
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_a_run_chooses_the_same_ranks_on_every_rank_and_keeps_to_the_budget(
    scope: str, rotation: str, tmp_path: Path
) -> None:
    config = tiny_config(compress=BUDGET | {"scope": scope, "rotation": rotation}, train={"sync_every": 1})
    one, (single,) = train(config, WORLDS["1"], tmp_path)
    shared, trainers = train(config, WORLDS["3+1"], tmp_path)
    ranks = single.model.ranks.ranks
    assert all(trainer.model.ranks.ranks == ranks for trainer in trainers)
    assert len(set(ranks.values())) > 1, "the spectrum made no difference"
    payload, spec = payload_format(config), full_spec(config)
    payload.ranks.choose(ranks)
    spent = sum(payload.chunk_bytes(layer, spec) for layer in range(2)) / (config.train.batch * spec.tokens)
    groups = 2 if scope == "head" else 1
    assert 80.0 - 4 * groups < spent <= 80.0
    said = [metrics or {} for metrics, _ in shared.said[0].values()]
    for (layer, kind), rank in ranks.items():
        assert [entry.get(f"layer{layer}_{kind}_rank") for entry in said] == [None] * 3 + [rank] + [None] * 3
    assert one.losses() == pytest.approx(shared.losses(), rel=1e-5)


@pytest.mark.parametrize("start", [2, 4])
def test_a_resumed_run_has_the_ranks_that_it_chose(start: int, tmp_path: Path) -> None:
    """And chooses them, where the warm start had just ended."""
    config = tiny_config(compress=BUDGET, train=TRAIN)
    whole, straight = train(config, WORLDS["3+1"], tmp_path)
    rest, resumed = train(config, WORLDS["3+1"], tmp_path, start=start)
    assert rest.losses() == whole.losses()[start:]
    assert [t.model.ranks.ranks for t in resumed] == [t.model.ranks.ranks for t in straight]
    model = drawn_model(config, VOCAB)
    load_model(checkpoint_folder(tmp_path, 6), model)
    assert model.ranks.ranks == straight[0].model.ranks.ranks
    with pytest.raises(ConfigError, match="leading is"):  # ranks by share are the config's, not the checkpoint's
        load_model(checkpoint_folder(tmp_path, 6), drawn_model(tiny_config(), VOCAB))


class Slow(Session):
    """Comes back from the vote for the basis only when the other rank has sent what it compressed by it."""

    ahead: threading.Event

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        super().vote(round_id, ok, digest, reason)
        if round_id == 22:  # the third round of the third step (`coordinated.go`)
            assert self.ahead.wait(30)


def test_a_peer_that_is_ahead_is_understood_and_one_before_the_choice_is_not(tmp_path: Path) -> None:
    """Over inboxes that validate: training through the choice, with each rank's own format, as a worker does."""
    config = tiny_config(compress=BUDGET, train=TRAIN)
    world = WORLDS["2x2"]
    loop = Loop(config, world)
    for inbox, wire in zip(loop.inboxes, loop.wires, strict=True):
        inbox._payload = wire._payload = payload_format(config)
    shared = Coordinator(config, world, 6)
    early = ChunkTag("kv", 1, 0, 0, 8, True, "float32", ((2, 8, 3),))
    with pytest.raises(ProtocolError, match="compressed=True: unexpected"):
        loop.inboxes[1].admit("node-0", 1, encode_tag(early), 192)

    ahead, send = threading.Event(), loop.wires[0].send

    def watched(rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        send(rank, kind, layer, chunk, key, tensors)
        if key.spec.compressed:
            ahead.set()

    loop.wires[0].send = watched  # type: ignore[method-assign]

    def work(rank: int, _: ThreadWire) -> Trainer:
        wire, session = loop.wires[rank], (Slow if rank else Session)(shared, rank)
        if isinstance(session, Slow):
            session.ahead = ahead
        payload = wire._payload
        exchange = ChunkExchange(Assignment(world), rank, payload, wire)
        here = World(loop.members[rank], exchange, Averager(rank, 2, wire, session), Checkpoints(tmp_path, rank))
        trainer = make_trainer(config, payload)
        trainer.run(here, session, Still())
        before = wire.sent_bytes["compressed"]
        loss_sum(trainer.model, exchange, contexts(config), full_spec(config)).backward()
        sent = step_bytes(payload, Assignment(world), rank, full_spec(config))
        assert wire.sent_bytes["compressed"] - before == sent.compressed_forward + sent.compressed_backward > 0
        return trainer

    one, _ = train(config, world, tmp_path)
    trainers = run_ranks(2, work)
    assert shared.losses() == one.losses()
    assert len({str(sorted(trainer.model.ranks.ranks.items())) for trainer in trainers}) == 1
    assert ahead.is_set()
