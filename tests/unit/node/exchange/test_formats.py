"""Formats: what comes back is within a bound, the bytes are exact, and gradients are rounded without bias.

How N ranks equal one in each format is in test_format_ranks.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from node.config import FormatName
from node.config.compress import ScaledName, UnitName
from node.exchange.formats import FORMATS, INT4_GROUP, Packed, TensorSpec, pack_bits, unpack_bits

NAMES = list(FORMATS)
UNBIASED = ["int8", "fp8", "int4", "int2"]
HAVE_ZERO = ["int8", "fp8", "int4"]
"""Formats of these that have a level at zero."""
SCALE_MARGIN = 1 + 2**-7
"""A scale is a little larger than it need be."""

tokens = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.integers(0, 1 << 30), st.integers(-25, 25)
)
"""Batch, tokens, width, a seed, and a power of ten that all numbers are multiplied with."""


def numbers(case: tuple[int, int, int, int, int]) -> Tensor:
    """Tokens of very different sizes, with zeros among them and in each of them."""
    batch, count, width, seed, power = case
    source = Generator().manual_seed(seed)
    x = torch.randn(batch, count, width, generator=source)
    x *= 10.0 ** (torch.rand(batch, count, 1, generator=source) * 4 + power)
    keep = torch.rand(batch, count, width, generator=source) < 0.9
    return x * keep * (torch.rand(batch, count, 1, generator=source) < 0.9)


def crossed(name: str, x: Tensor, seed: int | None = None) -> Tensor:
    """x as its readers see it; rounded at random with a seed."""
    draws = None if seed is None else Generator().manual_seed(seed)
    return FORMATS[name].unpack(FORMATS[name].pack(x, draws), x.shape[-1]).float()


def group_max(x: Tensor, group: int) -> Tensor:
    """For each number, the largest of its group."""
    parts = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.split(group, -1)]
    return torch.cat(parts, -1)


def step_at(name: str, x: Tensor) -> Tensor:
    """How far apart the numbers are, to both sides of x, that the format can tell (in x's units)."""
    width = x.shape[-1]
    if name == "bfloat16":
        return x.abs() * 2**-7
    if name == "int8":
        return group_max(x, width) / 127 * SCALE_MARGIN
    if name == "int4":
        return group_max(x, INT4_GROUP) / 7 * SCALE_MARGIN
    if name == "int2":
        return group_max(x, INT4_GROUP) / 1.5 * SCALE_MARGIN
    assert name == "fp8"
    subnormal = group_max(x, width) / 448 * SCALE_MARGIN * 2**-9
    return torch.maximum(x.abs() * 2**-3, subnormal)


def test_every_format_that_may_be_named_exists() -> None:
    assert get_args(FormatName) == tuple(FORMATS)


@settings(max_examples=50, deadline=None)
@given(tokens)
def test_float32_changes_nothing(case: tuple[int, int, int, int, int]) -> None:
    x = numbers(case)
    assert torch.equal(crossed("float32", x), x)
    assert torch.equal(crossed("float32", x, seed=1), x)
    assert FORMATS["float32"].pack(x)[0] is x  # no copy either


@pytest.mark.parametrize("name", ["bfloat16", "int8", "fp8", "int4"])
@settings(max_examples=50, deadline=None)
@given(case=tokens)
def test_nearest_is_within_half_a_step_and_random_within_one(name: str, case: tuple[int, int, int, int, int]) -> None:
    x = numbers(case)
    step = step_at(name, x)
    slack = 1 + 1e-5
    assert ((crossed(name, x) - x).abs() <= 0.5 * step * slack).all()
    assert ((crossed(name, x, seed=3) - x).abs() <= (0.5 if name == "bfloat16" else 1.0) * step * slack).all()


@settings(max_examples=50, deadline=None)
@given(tokens)
def test_topk_keeps_the_largest_tenth_and_nothing_else(case: tuple[int, int, int, int, int]) -> None:
    x = numbers(case)
    found = crossed("topk10", x)
    kept = max(1, round(0.1 * x.shape[-1]))
    assert int((found != 0).sum(-1).max()) <= kept
    largest = x.abs().sort(-1, descending=True).values[..., :kept]
    torch.testing.assert_close(found.abs().sort(-1, descending=True).values[..., :kept], largest, rtol=2**-8, atol=0)
    assert ((found == 0) | ((found - x).abs() <= x.abs() * 2**-8)).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(case=tokens, random=st.booleans())
def test_the_bytes_are_those_of_the_specs(name: str, case: tuple[int, int, int, int, int], random: bool) -> None:
    x = numbers(case)
    packed = FORMATS[name].pack(x, Generator().manual_seed(1) if random else None)
    specs = FORMATS[name].specs(tuple(x.shape))
    assert [TensorSpec(tuple(t.shape), t.dtype) for t in packed] == list(specs)
    assert [t.nbytes for t in packed] == [spec.nbytes for spec in specs]


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("float32", (8192, 164, 12)),
        ("bfloat16", (4096, 82, 6)),
        ("int8", (2050, 43, 5)),
        ("fp8", (2050, 43, 5)),
        ("int4", (1024 + 2 * 16, 21 + 2, 2 + 2)),
        ("int2", (512 + 2 * 16, 11 + 2, 1 + 2)),
        ("topk10", (205 * 4, 4 * 3, 1 * 3)),
        ("unit4", (1024, 21, 2)),
    ],
)
def test_bytes_by_hand(name: str, token_bytes: tuple[int, ...]) -> None:
    """A token of the paper's d_kv, of its K's rank, and of three numbers. Indices count: two bytes of 2,048 places."""
    for width, wanted in zip((2048, 41, 3), token_bytes, strict=True):
        assert sum(spec.nbytes for spec in FORMATS[name].specs((1, 1, width))) == wanted
    assert [spec.dtype for spec in FORMATS["topk10"].specs((70_000,))] == [torch.bfloat16, torch.int32]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1 << 30))
def test_bits_come_back_exactly(width: int, seed: int) -> None:
    for bits in (2, 4):
        half = 2 ** (bits - 1)
        q = torch.randint(-half, half, (2, 3, width), generator=Generator().manual_seed(seed))
        packed = pack_bits(q, bits)
        assert (packed.dtype, packed.shape) == (torch.uint8, (2, 3, -(-width * bits // 8)))
        assert torch.equal(unpack_bits(packed, width, bits).long(), q)


def test_what_lies_on_the_grid_of_int4_comes_back_as_it_was() -> None:
    """Sixteen bits hold all pairs: every one of ±7 beside every other, times a power of two."""
    pairs = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8)).flatten()
    scale, packed = FORMATS["int4"].pack(torch.cat([pairs, torch.tensor([7])]).float())
    assert torch.equal(unpack_bits(packed, len(pairs), 4).long(), pairs)
    assert bool((scale > 0).all())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(case=tokens)
def test_a_token_crosses_alone(name: str, case: tuple[int, int, int, int, int]) -> None:
    """To the bit as if there were no others: scales are causal, and chunks may be packed one by one or together."""
    x = numbers(case)
    together = crossed(name, x)
    for batch in range(x.shape[0]):
        for place in range(x.shape[1]):
            assert torch.equal(crossed(name, x[batch, place]), together[batch, place])


@pytest.mark.parametrize("name", get_args(ScaledName))
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(name: str) -> None:
    x = torch.zeros(2, 3, 20)
    assert torch.equal(crossed(name, x), x)
    assert torch.equal(crossed(name, x, seed=1), x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, 3, 20)
        x[0, 1, 4] = bad
        for seed in (None, 1):
            found = crossed(name, x, seed)
            assert not bool(found[0, 1, 4].isfinite())
            assert bool(found[1].isfinite().all())
            assert bool(found[0, ::2].isfinite().all())


def test_numbers_of_size_one_need_no_scale() -> None:
    """The mean square of what is lost is that of the best uniform quantiser of a normal distribution (Max, 1960)."""
    x = torch.randn(200, 500, generator=Generator().manual_seed(1))
    assert float((crossed("unit4", x) - x).square().mean()) == pytest.approx(0.01154, rel=0.03)


def test_two_bits_keep_the_size_of_a_token() -> None:
    x = torch.randn(200, 500, generator=Generator().manual_seed(1)) * 37
    assert float((crossed("int2", x) - x).square().mean() / x.square().mean()) == pytest.approx(0.1188, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_may_be_packed(name: str) -> None:
    """Under autocast payloads come in bfloat16."""
    x = torch.randn(2, 3, 20).bfloat16()
    assert torch.equal(crossed(name, x), crossed(name, x.float()))


def mean_over_draws(name: str, x: Tensor, count: int) -> Tensor:
    return torch.stack([crossed(name, x, seed) for seed in range(count)]).double().mean(0)


@pytest.mark.parametrize("name", UNBIASED)
@settings(max_examples=10, deadline=None)
@given(case=tokens.map(lambda case: (1, 2, *case[2:])))
def test_gradients_are_rounded_without_bias(name: str, case: tuple[int, int, int, int, int]) -> None:
    """The mean over draws is x: rounding between neighbours has a variance of at most step² / 4."""
    x, count = numbers(case), 400
    off = (mean_over_draws(name, x, count) - x).abs()
    assert (off <= 5.5 * 0.5 * step_at(name, x) / count**0.5).all()


@pytest.mark.parametrize("name", HAVE_ZERO)
def test_rounding_to_nearest_has_a_bias_that_draws_do_not(name: str) -> None:
    """A few large numbers, and many that nearest flushes to zero together with all that they sum to."""
    x = torch.full((1, INT4_GROUP), 2.0**-12 if name == "fp8" else 1e-3)
    x[0, 0] = 1000.0 if name == "fp8" else 1.0
    assert float(crossed(name, x)[0, 1:].sum()) == 0.0
    assert float(mean_over_draws(name, x, 400)[0, 1:].sum()) == pytest.approx(float(x[0, 1:].sum()), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_draws(name: str) -> None:
    x = torch.randn(2, 3, 50)

    def packed(seed: int) -> Packed:
        return FORMATS[name].pack(x, Generator().manual_seed(seed))

    assert all(torch.equal(*pair) for pair in zip(packed(1), packed(1), strict=True))
    differs = not all(torch.equal(*pair) for pair in zip(packed(1), packed(2), strict=True))
    assert differs == (name in (*UNBIASED, *get_args(UnitName)))
