"""Activation checkpointing (`run.recompute`): the same bits and the same messages, and fewer bytes kept.

What is kept is counted by storage: all memory that tensors of the forward hold when the forward is over.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.small import contexts, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, exchange_of, full_spec, sources_of, tiny_config
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from coordinator.assignment import Assignment
from node.config import Config
from node.exchange.formats import FORMATS
from node.exchange.passes import PassKey
from node.model import attention
from node.model.kernels import block_forward
from node.train.from_config import payload_format
from node.train.passes import loss_sum

SETTINGS: dict[str, dict[str, Any]] = {
    **MODES,
    **{f"compressed in {name}": {"format": name, "dense_format": "float32"} for name in FORMATS if name != "unit4"},
    "compressed in unit4": {
        "subspace": "learned",
        "rotation": "fixed",
        "centred": True,
        "whitened": True,
        "format": "unit4",
        "dense_format": "float32",
        "grad_format": "int4",
    },
}
Message = tuple[str, str, int, int, int]


class Noting(ThreadWire):
    """Notes every message, and every wait, in order."""

    def __init__(self, wire: ThreadWire) -> None:
        super().__init__(wire._post, wire._rank)
        self.events: list[Message] = []

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        self.events.append(("send", kind, layer, chunk, key.number))
        super().send(rank, kind, layer, chunk, key, tensors)

    def take(self, kind: str, layer: int, chunk: int, rank: int, number: int, *rest: Any) -> tuple[Tensor, ...]:
        self.events.append(("take", kind, layer, chunk, number))
        return super().take(kind, layer, chunk, rank, number, *rest)


Found = tuple[float, dict[str, Tensor], Counter[str], Counter[Message]]


def step(config: Config, world: Sequence[Sequence[int]]) -> list[Found]:
    """Loss, gradients, bytes and messages of every rank."""

    def work(rank: int, wire: ThreadWire) -> Found:
        noting, model = Noting(wire), small_model(config)
        loss = loss_sum(model, exchange_of(config, world, rank, noting), contexts(config), full_spec(config))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return loss.item(), gradients, noting.sent_bytes, Counter(noting.events)

    return run_ranks(len(world), work)


@pytest.mark.parametrize("world", ["1", "4"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_changes_no_bit_and_no_message(setting: str, world: str) -> None:
    sections: dict[str, Any] = {"compress": SETTINGS[setting], "train": {"batch": 4, "micro_batches": 2}}
    wanted = step(tiny_config(**sections), WORLDS[world])
    found = step(tiny_config(**sections, run={"recompute": True}), WORLDS[world])
    for (loss, gradients, nbytes, messages), (loss_2, gradients_2, nbytes_2, messages_2) in zip(
        wanted, found, strict=True
    ):
        assert loss_2 == loss
        assert gradients_2.keys() == gradients.keys()
        assert all(torch.equal(gradients_2[name], gradients[name]) for name in gradients)
        assert nbytes_2 == nbytes
        assert messages_2 == messages


@pytest.mark.parametrize("world", ["2x2", "3+1", "zigzag"])
def test_nor_where_a_node_reads_its_own_chunks_and_others(world: str) -> None:
    test_it_changes_no_bit_and_no_message("two angles of the chunk before", world)


def test_the_kernels_of_attention_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their result is kept, since over a long context they are most of a step's time."""
    calls: list[bool] = []

    def counting(*block: Any, causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(causal)
        return block_forward(*block, causal=causal)

    monkeypatch.setattr(attention, "block_forward", counting)
    step(tiny_config(), WORLDS["zigzag"])
    once = len(calls)
    step(tiny_config(run={"recompute": True}), WORLDS["zigzag"])
    assert len(calls) == 2 * once > 0


def test_under_autocast_it_changes_no_bit() -> None:
    """As on a GPU: the backward runs outside the context, and what is computed again within it."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        config = tiny_config(run={"recompute": recompute})
        model = small_model(config)
        with torch.autocast("cpu", torch.bfloat16):
            handle = exchange_of(config, WORLDS["1"], 0, None).begin(full_spec(config), trains=True)
            tokens = torch.from_numpy(contexts(config)[:, :-1]).unflatten(1, (4, -1)).movedim(1, 0)
            logits = model.logits(tokens, handle)
        logits.float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients(False), gradients(True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Storages(TorchDispatchMode):
    """The storages that operations have made, beside those of the weights, for as long as something holds them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return found

    def held_bytes(self) -> int:
        gc.collect()
        held = [place for place, (storage, _) in self._seen.items() if not storage.expired()]
        return sum(self._seen[place][1] for place in held if place not in self._weights)


BIG: dict[str, Any] = {"d_model": 64, "heads": 8, "kv_heads": 2, "ffn_dim": 160, "context": 512, "chunks": 4}


class Copying(ThreadWire):
    """What it sends is the receiver's memory, not the sender's."""

    def send(self, *message: Any) -> None:
        with _disable_current_modes():
            super().send(*message)

    def take(self, *message: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in super().take(*message))


def kept_bytes(config: Config, world: str) -> list[int]:
    """Bytes that a forward leaves for its backward, by rank."""

    def work(rank: int, wire: ThreadWire) -> int:
        copying = Copying(wire._post, rank)
        model, exchange = small_model(config), exchange_of(config, WORLDS[world], rank, copying)
        with Storages(model) as storages:
            loss = loss_sum(model, exchange, contexts(config), full_spec(config))
            kept = storages.held_bytes()
        assert loss.isfinite()
        return kept

    gc.freeze()  # each rank collects garbage, and need not walk all that was imported
    try:
        return run_ranks(len(WORLDS[world]), work)
    finally:
        gc.unfreeze()


def kept_by_layer(world: str, recompute: bool, **compress: Any) -> list[int]:
    """Bytes that one layer's forward leaves for its backward, by rank."""
    compress = {"format": "int4", "dense_last_layers": 0} | compress

    def whole(layers: int) -> list[int]:
        return kept_bytes(
            tiny_config(
                run={"recompute": recompute},
                model=BIG | {"layers": layers},
                compress=compress,
                train={"batch": 1},
            ),
            world,
        )

    return [more - less for more, less in zip(whole(2), whole(1), strict=True)]


@pytest.mark.parametrize("world", ["1", "zigzag", "4"])
@pytest.mark.parametrize("compress", [{}, {"mode": "dense", "dense_format": "bfloat16"}], ids=["int4", "dense in bf16"])
def test_a_layer_keeps_its_input_its_attention_s_output_and_what_arrived(world: str, compress: dict[str, Any]) -> None:
    """Float32 residuals of d numbers a token, H·D numbers of output, H log-sum-exps; payloads as they came."""
    config = tiny_config(model=BIG, compress={"format": "int4", "dense_last_layers": 0} | compress, train={"batch": 1})
    model, payload, assignment = config.model, payload_format(config), Assignment(WORLDS[world])
    token_bytes = 4 * (model.d_model + model.heads * model.head_size + model.heads)
    kept, before = kept_by_layer(world, True, **compress), kept_by_layer(world, False, **compress)
    for rank, (found, whole) in enumerate(zip(kept, before, strict=True)):
        tokens = len(assignment.chunks(rank)) * model.chunk_tokens
        arrived = len(sources_of(assignment, rank)) * payload.chunk_bytes(0, full_spec(config))
        print(f"world {world}, rank {rank}: {whole / tokens:.0f} bytes a token and layer, {found / tokens:.0f} with")
        assert found == tokens * token_bytes + arrived
        assert found < whole / 3
