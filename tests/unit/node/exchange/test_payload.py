"""The closed formula of bytes against what wires count, and the compression that the paper states."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from helpers.small import contexts, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import MODES, WORLDS, Loop, exchange_of, full_spec, tiny_config

from coordinator.assignment import Assignment, assign
from netem.errors import ConfigError
from node.config.compress import ScaledName
from node.exchange.formats import TensorSpec
from node.exchange.passes import PassSpec
from node.exchange.payload import StepBytes, step_bytes
from node.train.from_config import payload_format
from node.train.passes import loss_sum

SCALED = get_args(ScaledName)

CASES: dict[str, dict[str, Any]] = MODES | {
    "geodesic, bfloat16": {"format": "bfloat16"},
    "dense, bfloat16": {"mode": "dense", "format": "bfloat16"},
    "all layers compressed": {"dense_last_layers": 0},
    "the last two layers see far": {"remote_last_layers": 2, "format": "bfloat16"},
    "two layers dense": {"dense_last_layers": 2, "scope": "head", "format": "bfloat16"},
    "int8, the last layer in fp8": {"format": "int8", "dense_format": "fp8"},
    "float32, the last layer in int8": {"dense_format": "int8"},
    "fp8, a basis a head": {"format": "fp8", "scope": "head"},
    "top-k": {"mode": "dense", "dense_format": "topk10"},
    "int4": {"mode": "dense", "dense_format": "int4"},
    "int4 and top-k": {"format": "int4", "dense_format": "topk10"},
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_a_counting_wire_sees(case: str, world: str) -> None:
    config = tiny_config(compress=CASES[case])
    assignment, spec = Assignment(WORLDS[world]), full_spec(config)

    def work(rank: int, wire: ThreadWire) -> tuple[int, int]:
        exchange = exchange_of(config, WORLDS[world], rank, wire)
        loss_sum(small_model(config), exchange, contexts(config), spec).backward()
        sent = wire.sent_bytes
        return sent["kv"] + sent["theta"], sent["grad"] + sent["dtheta"]

    counted = run_ranks(len(WORLDS[world]), work)
    formula = [step_bytes(payload_format(config), assignment, rank, spec) for rank in range(assignment.n_ranks)]
    assert counted == [
        (sent.compressed_forward + sent.dense_forward, sent.compressed_backward + sent.dense_backward)
        for sent in formula
    ]
    assert [sum(pair) for pair in counted] == [sent.total for sent in formula]
    assert (sum(map(sum, counted)) == 0) == (len(WORLDS[world]) == 1 or case == "local")


@pytest.mark.parametrize(
    "case",
    [
        "geodesic",
        "two layers dense",
        "dense, bfloat16",
        "local",
        "int8, the last layer in fp8",
        "top-k",
        "the last two layers see far",
    ],
)
def test_the_wire_counts_by_what_bytes_are_for(case: str) -> None:
    """Compressed layers, dense layers, and what both would have been; passes without gradients apart."""
    config = tiny_config(compress=CASES[case])
    world, spec = WORLDS["3+1"], full_spec(config)
    loop = Loop(config, world)

    def work(rank: int, _: ThreadWire) -> dict[str, int]:
        exchange, model = exchange_of(config, world, rank, loop.wires[rank]), small_model(config)
        loss_sum(model, exchange, contexts(config), spec).backward()
        with torch.no_grad():
            loss_sum(model, exchange, contexts(config), spec)
        return dict(loop.wires[rank].sent_bytes)

    payload, plain = payload_format(config), 2 * 2 * 8 * 16 * (4 if case == "geodesic" else 2)
    exchanging = payload.layers - config.local_layers
    for rank, counted in enumerate(run_ranks(2, work)):
        formula = step_bytes(payload, Assignment(world), rank, spec)
        assert counted.get("compressed", 0) == formula.compressed_forward + formula.compressed_backward
        assert counted.get("dense", 0) == formula.dense_forward + formula.dense_backward
        assert counted.get("evaluation", 0) == formula.compressed_forward + formula.dense_forward
        messages = 0 if case == "local" else 3  # three chunks to one reader, and its gradients of them
        assert counted.get("uncompressed", 0) == messages * exchanging * plain
        assert counted.get("replaced", 0) == messages * len(config.compressed) * plain


def test_the_formula_by_hand() -> None:
    """Four ranks of one chunk, K and V of 16 to ranks 3 and 6, batch 2, 8 tokens, float32: two layers of three."""
    payload = payload_format(tiny_config())
    spec = PassSpec(8, True)
    compressed = 4 * (2 * 8 * 3 + 2 + 2 * 8 * 6 + 2)
    assert payload.chunk_bytes(0, spec) == payload.chunk_bytes(1, spec) == compressed
    dense = 4 * (2 * 2 * 8 * 16)
    assert payload.chunk_bytes(2, spec) == payload.chunk_bytes(0, PassSpec(8, False)) == dense
    four = assign(4, 4)
    assert step_bytes(payload, four, 0, spec) == StepBytes(3 * 2 * compressed, 0, 3 * dense, 0)
    assert step_bytes(payload, four, 2, spec) == StepBytes(2 * compressed, 2 * 2 * compressed, dense, 2 * dense)
    assert step_bytes(payload, four, 3, PassSpec(8, False)) == StepBytes(0, 0, 0, 3 * 3 * dense)


def test_the_formula_by_hand_in_narrow_formats() -> None:
    """K and V of 16 in int8, with a scale of two bytes; ranks 3 and 6 in int4, a scale and two or three bytes; θ."""
    payload = payload_format(tiny_config(compress={"format": "int4", "dense_format": "int8"}))
    tokens = 2 * 8
    assert payload.chunk_bytes(0, PassSpec(8, True)) == tokens * (2 + 2) + tokens * (2 + 3) + 2 * 2 * 4
    assert payload.chunk_bytes(2, PassSpec(8, True)) == payload.chunk_bytes(0, PassSpec(8, False)) == 2 * tokens * 18
    topk = payload_format(tiny_config(compress={"mode": "dense", "dense_format": "topk10"}))
    assert topk.chunk_bytes(0, PassSpec(8, False)) == 2 * tokens * 2 * (2 + 1)  # two of 16: a value, and its place


@pytest.mark.parametrize(
    ("compress", "width"),
    [
        ({}, 4),
        ({"format": "bfloat16"}, 2),
        ({"format": "int8"}, 2),
        ({"dense_format": "int8"}, 2),
        ({"format": "bfloat16", "dense_format": "float32"}, 2),
        ({"mode": "dense"}, 4),
        ({"mode": "dense", "dense_format": "int4"}, 2),
        ({"mode": "dense", "dense_format": "topk10"}, 2),
        ({"mode": "dense", "format": "int8", "dense_format": "float32"}, 4),
    ],
    ids=str,
)
def test_uncompressed_is_float32_only_where_nothing_else_is_sent(compress: dict[str, Any], width: int) -> None:
    payload = payload_format(tiny_config(compress=compress))
    assert payload.uncompressed_bytes(PassSpec(8, True)) == 2 * 2 * 8 * 16 * width


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (8, 256)], ids=["d_kv 256", "d_kv 2048"])
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_98_and_95_percent_save_96_percent_of_a_compressed_layer(
    scope: str, heads: int, head_dim: int, format: str
) -> None:
    config = tiny_config(
        model={"d_model": heads * head_dim, "heads": heads, "kv_heads": heads, "context": 1024},
        compress={"k_share": 0.98, "v_share": 0.95, "scope": scope, "format": format},
    )
    payload, spec = payload_format(config), full_spec(config)
    left = payload.chunk_bytes(0, spec) / payload.chunk_bytes(0, PassSpec(spec.tokens, False))
    print(f"{scope}, d_kv {heads * head_dim}, {format}: {1 - left:.3%} saved")
    assert 0.96 <= 1 - left < 0.97


def test_theta_travels_in_float32_whatever_the_wire() -> None:
    payload = payload_format(tiny_config(compress={"format": "bfloat16", "scope": "head"}))
    k, k_theta, v, v_theta = payload.tensors(0, PassSpec(8, True))
    assert (k, v) == (TensorSpec((2, 8, 4), torch.bfloat16), TensorSpec((2, 8, 6), torch.bfloat16))
    assert k_theta == v_theta == TensorSpec((2, 2), torch.float32)
    for name in SCALED:
        tensors = payload_format(tiny_config(compress={"format": name})).tensors(0, PassSpec(8, True))
        assert tensors[len(tensors) // 2 - 1] == tensors[-1] == TensorSpec((2, 1), torch.float32)


def test_the_passes_of_a_run_are_known() -> None:
    """What an inbox admits: full chunks, and where there is a warm start, its short and uncompressed ones."""
    assert payload_format(tiny_config()).passes == {PassSpec(8, True), PassSpec(4, False)}
    assert payload_format(tiny_config(compress={"mode": "dense"})).passes == {PassSpec(8, False)}
    unplugged = payload_format(tiny_config(compress={"unplug_step": 5}))
    assert unplugged.passes == {PassSpec(8, True), PassSpec(4, False), PassSpec(8, False)}


def test_a_layer_that_sees_only_its_own_chunk_sends_nothing_and_none_is_let_in() -> None:
    payload = payload_format(tiny_config(compress={"remote_last_layers": 2}))
    for spec in (PassSpec(8, True), PassSpec(4, False)):
        assert [payload.exchanges(layer) for layer in range(3)] == [False, True, True]
        assert (payload.chunk_bytes(0, spec), payload.theta_bytes(0, spec)) == (0, 0)
        assert payload.message("kv", 0, spec) is payload.message("grad", 0, spec) is None
        assert payload.message("kv", 1, spec) == payload.tensors(1, spec) != ()
        assert payload.message("done", 0, spec) == ()
    silent = payload_format(tiny_config(compress={"mode": "local"}))
    assert [silent.message("kv", layer, PassSpec(8, False)) for layer in range(3)] == [None] * 3


def test_a_rank_that_leaves_no_room_is_an_error_that_names_the_mend() -> None:
    with pytest.raises(
        ConfigError, match=r"compress\.v_share = 0\.4: rotation 'geodesic' wants 20 directions for rank 10"
    ):
        payload_format(tiny_config(compress={"v_share": 0.4}))
    payload_format(tiny_config(compress={"v_share": 0.4, "rotation": "taylor2"}))
