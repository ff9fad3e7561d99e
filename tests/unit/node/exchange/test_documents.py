"""Documents in a pass: which rows of a chunk its readers see, and what the wire carries of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers.packed import DOCUMENT_MODES, ENDS, documents_of, masking_config, packed
from helpers.small import small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, exchange_of, full_spec
from torch import Tensor

from coordinator.assignment import Assignment
from netem.errors import PeerLate, ProtocolError
from node.exchange.chunks import most_ahead
from node.exchange.documents import Documents, Run
from node.exchange.formats import FORMATS
from node.exchange.passes import PassKey
from node.exchange.payload import step_bytes
from node.train.from_config import payload_format
from node.train.passes import loss_sum

TOKENS, CHUNKS = 4, 4


def random_documents(seed: int) -> tuple[np.ndarray, Documents]:
    """Which document each token belongs to, [B, T], and the same as `Documents`."""
    draw = np.random.default_rng(seed)
    begins = draw.random((3, TOKENS * CHUNKS)) < draw.choice([0.02, 0.1, 0.3])
    begins[:, 0] = draw.random() < 0.5  # the first token begins a document in any case
    return begins.cumsum(1) - begins[:, :1], Documents(begins, TOKENS)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_seen_is_what_a_mask_would_let_through(seed: int) -> None:
    number_BT, documents = random_documents(seed)
    chunk_n = number_BT.reshape(3, CHUNKS, TOKENS)
    subsets = [sub for size in (1, 2, 3) for sub in itertools.combinations(range(CHUNKS), size)]
    for chunk, readers in itertools.product(range(CHUNKS), subsets):
        later = [reader for reader in readers if reader > chunk]
        seen = {
            (context, row)
            for context, row, reader in itertools.product(range(3), range(TOKENS), later)
            if (chunk_n[context, reader] == chunk_n[context, chunk, row]).any()
        }
        tails = documents.tails(chunk, readers)
        assert {(context, row) for context, begin, end in tails for row in range(begin, end)} == seen
        assert documents.rows(chunk, readers) == len(seen)
        for context, begin, _ in tails:
            queries = np.concatenate([chunk_n[context, reader] for reader in later])
            sees = queries == chunk_n[context, chunk, begin]
            count = documents.seen_by(chunk, context, later)
            assert sees[:count].all()
            assert not sees[count:].any()
    for chunk, context in itertools.product(range(CHUNKS), range(3)):
        earlier = tuple(range(0, chunk, 2))
        first, before = chunk_n[context, chunk, 0], [chunk_n[context, other] for other in earlier]
        goes_back = chunk > 0 and chunk_n[context, chunk - 1, -1] == first
        assert documents.head(chunk, context) == (chunk_n[context, chunk] == first).sum() * goes_back
        assert documents.before(chunk, context, earlier) == sum((numbers == first).sum() for numbers in before)
        parts = [part for part in documents.parts(chunk) if part.context == context]
        lengths = np.unique(chunk_n[context, chunk], return_counts=True)[1].tolist()
        assert [part.end - part.begin for part in parts] == lengths


def test_the_tails_of_known_contexts() -> None:
    """Chunks of 8; where the documents end is in `ENDS`."""
    config = masking_config()
    documents = documents_of(config, packed(config))
    assert documents.tail_begins(0) == [8, 0, 5, 0]
    assert documents.tails(0, (1, 2, 3)) == [Run(1, 0, 8), Run(2, 5, 8), Run(3, 0, 8)]
    assert documents.tails(0, (2,)) == [Run(1, 0, 8), Run(2, 5, 8)]
    assert documents.tails(1, (2, 3)) == [Run(0, 5, 8), Run(1, 0, 8), Run(2, 0, 8)]
    assert documents.tails(3, (0, 1, 2)) == []


def sent(mode: str, world: str, format: str = "float32") -> tuple[list[dict[str, int]], list[Any]]:
    """Bytes that every rank sent in a training pass, by kind, and the formula's figures for it."""
    config = masking_config(mode, compress={"format": format, "grad_format": "same"})
    contexts, spec = packed(config), full_spec(config)

    def work(rank: int, wire: ThreadWire) -> dict[str, int]:
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        loss_sum(small_model(config), exchange, contexts, spec).backward()
        return dict(wire.sent_bytes)

    payload, assignment, documents = payload_format(config), Assignment(WORLDS[world]), documents_of(config, contexts)
    formula = [step_bytes(payload, assignment, rank, spec, documents) for rank in range(len(WORLDS[world]))]
    return run_ranks(len(WORLDS[world]), work), formula


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "1"])
@pytest.mark.parametrize("mode", DOCUMENT_MODES)
def test_the_wire_carries_the_formula_s_bytes(mode: str, world: str) -> None:
    found, formula = sent(mode, world)
    for by_kind, wanted in zip(found, formula, strict=True):
        assert by_kind.get("kv", 0) == wanted.compressed_forward + wanted.dense_forward
        assert by_kind.get("grad", 0) == wanted.compressed_backward + wanted.dense_backward
    config = masking_config(mode)
    all_rows = [
        step_bytes(payload_format(config), Assignment(WORLDS[world]), rank, full_spec(config)).total
        for rank in range(len(WORLDS[world]))
    ]
    assert sum(one.total for one in formula) < sum(all_rows) or mode == "local"


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "unit4"])  # that one needs a learned subspace
def test_and_so_it_does_in_every_format(format: str) -> None:
    found, formula = sent("fixed", "zigzag", format)
    assert [sum(by_kind.values()) for by_kind in found] == [wanted.total for wanted in formula]
    assert all(by_kind["grad"] > 0 for by_kind in found)


def test_a_row_costs_its_part_of_a_chunk_and_empty_pairs_nothing() -> None:
    config = masking_config("dense")
    payload, four, spec = payload_format(config), Assignment(WORLDS["4"]), full_spec(config)
    documents = documents_of(config, packed(config))
    row_bytes = 3 * 2 * config.model.d_kv * 4  # of K and of V, in three layers, in float32
    assert payload.chunk_bytes(0, spec, rows=1) * 3 == row_bytes
    rows = {0: (8 + 3 + 8) + 2 * (8 + 3), 1: (3 + 8 + 8) + (8 + 8), 2: 4 + 8 + 8}  # by owner, over its readers
    for rank, count in rows.items():
        assert step_bytes(payload, four, rank, spec, documents).dense_forward == count * row_bytes, rank
    apart = documents_of(config, packed(config, ends=[(7, 15, 23, 31)] * 4))
    assert all(step_bytes(payload, four, rank, spec, apart).total == 0 for rank in range(4))


def test_empty_pairs_send_no_message() -> None:
    config, messages = masking_config("fixed"), []

    class Noting(ThreadWire):
        def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
            messages.append((kind, chunk, self._rank, rank))
            super().send(rank, kind, layer, chunk, key, tensors)

    def work(rank: int, wire: ThreadWire) -> None:
        exchange = exchange_of(config, WORLDS["4"], rank, Noting(wire._post, rank))
        loss_sum(small_model(config), exchange, packed(config, ends=[(7, 12)] * 4), full_spec(config)).backward()

    run_ranks(4, work)
    pairs = {(1, 2), (1, 3), (2, 3)}  # the document that begins at 13; chunk 0 is a document
    assert {(chunk, reader) for kind, chunk, _, reader in messages if kind == "kv"} == pairs
    assert {(chunk, reader) for kind, chunk, reader, _ in messages if kind == "grad"} == pairs
    assert len(messages) == 2 * 3 * len(pairs)  # both ways, in three layers


def over_inboxes(micro_batches: int) -> tuple[Loop, float]:
    """A training step of four ranks over inboxes that validate, with so many passes in flight."""
    config = masking_config(train={"micro_batches": micro_batches})
    loop, contexts = Loop(config, WORLDS["4"]), packed(config)

    def work(rank: int, _: ThreadWire) -> float:
        exchange = exchange_of(config, WORLDS["4"], rank, loop.wires[rank])
        loss = loss_sum(small_model(config), exchange, contexts, full_spec(config))
        loss.backward()
        return loss.item()

    return loop, sum(run_ranks(4, work))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_inboxes_that_validate_let_the_rows_in_that_are_owed(micro_batches: int) -> None:
    loop, loss = over_inboxes(micro_batches)
    assert loss == pytest.approx(over_inboxes(1)[1], rel=5e-7)
    for inbox in loop.inboxes:
        assert (inbox._held, inbox._admitted, inbox._open) == ({}, set(), set())


def test_what_replaced_keys_and_values_is_counted_by_its_rows() -> None:
    loop, _ = over_inboxes(1)
    config = masking_config()
    documents, d_kv = documents_of(config, packed(config)), config.model.d_kv
    for rank, wire in enumerate(loop.wires):
        sent = sum(documents.rows(rank, [reader]) for reader in range(rank + 1, 4))
        returned = sum(documents.rows(chunk, [rank]) for chunk in range(rank))
        assert wire.sent_bytes["uncompressed"] == 3 * 2 * d_kv * 4 * (sent + returned)
        assert wire.sent_bytes["replaced"] == 2 * 2 * d_kv * 4 * (sent + returned)


@pytest.mark.parametrize("rows", [0, 33])
def test_an_inbox_refuses_rows_that_no_chunk_has(rows: int) -> None:
    config = masking_config("dense")
    loop = Loop(config, WORLDS["4"])
    key = PassKey(1, full_spec(config), True)
    payload = tuple(torch.zeros(rows, config.model.d_kv) for _ in "kv")
    with pytest.raises(ProtocolError, match="shapes"):
        loop.wires[0].send(1, "kv", 0, 0, key, payload)
    loop.wires[0].send(1, "kv", 0, 0, key, tuple(torch.zeros(32, config.model.d_kv) for _ in "kv"))


def test_rows_that_are_not_those_of_the_pass_are_refused_when_they_are_taken() -> None:
    """An inbox may get a payload before its pass begins, so only then is it known how many rows it should have."""
    config = masking_config("dense")
    loop, contexts = Loop(config, WORLDS["4"]), packed(config)
    key = PassKey(1, full_spec(config), True)
    rows = documents_of(config, contexts).rows(0, [1])
    loop.wires[0].send(1, "kv", 0, 0, key, tuple(torch.zeros(rows - 1, config.model.d_kv) for _ in "kv"))
    with pytest.raises(ProtocolError, match="expected"):
        loss_sum(small_model(config), exchange_of(config, WORLDS["4"], 1, loop.wires[1]), contexts, full_spec(config))


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_an_owner_that_nobody_reads_may_be_through_with_a_step_and_two_evaluations(micro_batches: int) -> None:
    """It waits for no gradients; in evaluations it waits for its readers' word. Inboxes let in what it sends."""
    batch = 2 * micro_batches
    config = masking_config(batch=batch, train={"micro_batches": micro_batches})
    loop = Loop(config, WORLDS["2x2"], timeout_s=0.05)
    apart = packed(config, ends=[(15,)] * batch)  # nothing crosses from the first node to the second
    joined = packed(config, ends=[()] * batch)
    model, exchange = small_model(config), exchange_of(config, WORLDS["2x2"], 0, loop.wires[0])
    loss_sum(model, exchange, apart, full_spec(config)).backward()

    def evaluate_on_and_on() -> None:
        while True:
            loss_sum(model, exchange, joined, full_spec(config))

    with torch.no_grad(), pytest.raises(PeerLate, match="waited"):
        evaluate_on_and_on()
    begun = loop.inboxes[0]._newest - 1  # the last one waited before it sent anything
    assert begun >= micro_batches + 2
    assert begun <= most_ahead(payload_format(config))


def test_all_contexts_of_this_module_are_of_one_batch() -> None:
    assert len(ENDS) == masking_config().train.batch
