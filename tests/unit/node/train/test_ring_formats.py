"""Shards on the ring: the bytes of the formula, what each format rounds away, and that nothing is lost over time."""

from __future__ import annotations

import pytest
import torch
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, tiny_config
from torch import Tensor

from node.train import averaging
from node.train.averaging import RingSum, all_reduce, bytes_sent
from node.train.ring_formats import FLOAT32, RING_FORMATS

FORMATS = list(RING_FORMATS)
LENGTHS = [1, 5, 255, 256, 257, 1000]
ERRORS = {"float32": 1e-6, "bfloat16": 0.005, "int8": 0.012, "fp8": 0.045, "int4": 0.2, "topk10": 0.9}
"""Bounds on the relative error of a sum of four normal vectors."""


def vector(rank: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * seed + rank))


def summed(form: str, length: int, seed: int, residuals: list[Tensor | None], world: int = 4) -> list[RingSum]:
    def work(rank: int, wire: ThreadWire) -> RingSum:
        own = vector(rank, length, seed)
        return all_reduce(own, rank, world, wire, 7, RING_FORMATS[form], residuals[rank])

    return run_ranks(world, work)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_has_the_bytes_of_the_formula_and_comes_back(form: str, length: int) -> None:
    packed = RING_FORMATS[form].encode(vector(0, length))
    assert (packed.dtype, packed.shape) == (torch.uint8, (RING_FORMATS[form].nbytes(length),))
    back = RING_FORMATS[form].decode(packed, length)
    assert (back.dtype, back.shape) == (torch.float32, (length,))
    again = RING_FORMATS[form].decode(RING_FORMATS[form].encode(back), length)
    torch.testing.assert_close(again, back, rtol=0.05, atol=1e-6)


def test_the_bytes_of_a_million_numbers() -> None:
    million = {form: RING_FORMATS[form].nbytes(1 << 20) for form in FORMATS}
    rows = (1 << 20) // 256
    assert million == {
        "float32": 4 << 20,
        "bfloat16": 2 << 20,
        "int8": rows * (256 + 2),
        "fp8": rows * (256 + 2),
        "int4": rows * (128 + 4),
        "topk10": rows * 26 * 3,
    }


@pytest.mark.parametrize("length", [3, 100, 2050])
@pytest.mark.parametrize("form", FORMATS)
def test_over_real_wires_all_ranks_have_the_same_bits_and_send_the_bytes_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, form: str, length: int
) -> None:
    """In several buckets, of which the last is shorter; two at once are on the wire."""
    monkeypatch.setattr(averaging, "BUCKET_ELEMENTS", 600)
    loop = Loop(tiny_config(), WORLDS["4"])

    def work(rank: int, _: ThreadWire) -> Tensor:
        wire = loop.wires[rank]
        return all_reduce(vector(rank, length), rank, 4, wire, 3, RING_FORMATS[form], at_once=2).total

    found = run_ranks(4, work)
    assert all(torch.equal(one, found[0]) for one in found)
    sent = [wire.sent_bytes["averaging"] for wire in loop.wires]
    assert sent == [bytes_sent(length, RING_FORMATS[form], 4, rank) for rank in range(4)]
    assert sum(sent) == sum(  # each of the 2 (N − 1) hops passes on every shard once
        6 * RING_FORMATS[form].nbytes(len(shard))
        for bucket in torch.zeros(length).split(600)
        for shard in bucket.tensor_split(4)
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_sum_is_off_by_no_more_than_was_measured(form: str) -> None:
    length = 20_000
    exact = sum(vector(rank, length).double() for rank in range(4))
    assert isinstance(exact, Tensor)
    total = summed(form, length, 0, [None] * 4)[0].total.double()
    error = float((total - exact).norm() / exact.norm())
    print(f"{form}: {error:.5f}")
    assert ERRORS[form] / 4 < error < ERRORS[form] or form == "float32"


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("form", ["int8", "fp8", "int4", "topk10"])
def test_what_is_left_out_of_one_sum_is_in_the_next(form: str, world: int) -> None:
    """Over time, sums + residuals are the exact sums; and a last one in float32 leaves nothing."""
    length, rounds = 700, 6
    residuals: list[Tensor | None] = [None] * world
    sent = torch.zeros(length, dtype=torch.float64)
    for seed in range(rounds):
        results = summed(form, length, seed, residuals, world)
        residuals = [result.residual for result in results]
        sent += results[0].total
    exact = torch.stack([vector(rank, length, seed).double() for rank in range(world) for seed in range(rounds)]).sum(0)
    left = torch.stack([residual for residual in residuals if residual is not None]).double().sum(0)
    torch.testing.assert_close(sent + left, exact, rtol=0, atol=1e-4)
    assert world == 1 or float((sent - exact).norm() / exact.norm()) > 1e-3
    last = summed("float32", length, rounds, residuals, world)
    sent += last[0].total
    exact += torch.stack([vector(rank, length, rounds).double() for rank in range(world)]).sum(0)
    torch.testing.assert_close(sent, exact, rtol=0, atol=1e-4)
    assert all(result.residual is not None and torch.count_nonzero(result.residual) == 0 for result in last)


def test_float32_and_bfloat16_feed_nothing_back() -> None:
    assert summed("bfloat16", 50, 0, [None] * 4)[0].residual is None
    assert summed("float32", 50, 0, [None] * 4)[0].residual is None


def test_a_number_that_is_not_finite_stays_so() -> None:
    for form in RING_FORMATS.values():
        bad = vector(0, 300)
        bad[7] = torch.nan
        assert not torch.isfinite(form.decode(form.encode(bad), 300)).all(), form.name


def test_in_float32_nothing_is_copied() -> None:
    shard = vector(0, 40)
    assert FLOAT32.encode(shard).data_ptr() == shard.data_ptr()
