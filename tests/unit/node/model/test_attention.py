"""Attention over chunks that arrive one by one, against one softmax over the whole context in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.model.attention import ChunkAttention

B, H, N, D, CHUNKS = 2, 3, 5, 8, 4
TOLERANCE = 1e-12  # relative to the largest entry, in float64; measured: 2e-15
OWNERS = [(0,), (3,), (0, 1, 2, 3), (1, 2), (0, 3), (2, 3)]


def context() -> list[Tensor]:
    """q, k, v and the output's gradient, each [CHUNKS, B, H, n, D]."""
    source = torch.Generator().manual_seed(0)
    return [torch.randn(CHUNKS, B, H, N, D, generator=source, dtype=torch.float64) for _ in range(4)]


def whole(x_CBHnD: Tensor) -> Tensor:
    return x_CBHnD.movedim(0, 2).flatten(2, 3)


def chunked(
    own: tuple[int, ...], arrival: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of the own chunks, and gradients of q, of own k and v, and of every earlier chunk's k and v."""
    q, k, v, dout = (tensor.to(dtype) for tensor in context())
    q_own, k_own, v_own = (tensor[list(own)].requires_grad_() for tensor in (q, k, v))
    earlier = tuple(range(own[-1]))
    sent = {chunk: (k[chunk].clone().requires_grad_(), v[chunk].clone().requires_grad_()) for chunk in earlier}
    far = {chunk: sum(mine <= chunk for mine in own) for chunk in earlier if chunk not in own}
    attention = ChunkAttention(q_own * 1.0, far, local=len(own) > 1)
    attention.attend_own(k_own, v_own, torch.zeros(()))
    if len(own) > 1:
        k_local, v_local = (torch.stack([sent[chunk][part] for chunk in own[:-1]]) for part in (0, 1))
        attention.attend_local(k_local, v_local)
    for chunk in arrival:
        if chunk in far:
            attention.attend_far(chunk, *sent[chunk])
    out = attention.merge()
    inputs = (q_own, k_own, v_own, *(tensor for chunk in earlier for tensor in sent[chunk]))
    return out.detach(), torch.autograd.grad(out, inputs, dout[list(own)])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whoever_owns_what_and_whatever_comes_first_it_is_one_softmax(data: st.DataObject) -> None:
    chunks = range(CHUNKS)
    own = tuple(sorted(data.draw(st.sets(st.sampled_from(chunks), min_size=1), label="own")))
    arrival = tuple(data.draw(st.permutations(range(own[-1])), label="arrival"))
    assert_one_softmax(own, arrival)


@pytest.mark.parametrize("own", OWNERS)
def test_chunks_together_are_one_softmax(own: tuple[int, ...]) -> None:
    assert_one_softmax(own, tuple(range(own[-1])))


def assert_one_softmax(own: tuple[int, ...], arrival: tuple[int, ...]) -> None:
    q, k, v, dout = context()
    out, (dq, dk_own, dv_own, *far) = chunked(own, arrival)

    q_all, k_all, v_all = (whole(tensor).requires_grad_() for tensor in (q, k, v))
    mask = torch.ones(CHUNKS * N, CHUNKS * N, dtype=torch.bool).triu(1)
    scores = (q_all @ k_all.mT / D**0.5).masked_fill(mask, float("-inf"))
    wanted = (scores.softmax(-1) @ v_all).unflatten(2, (CHUNKS, N)).movedim(2, 0)[list(own)]
    grads = torch.autograd.grad(wanted, (q_all, k_all, v_all), dout[list(own)])
    dq_all, dk_all, dv_all = (grad.unflatten(2, (CHUNKS, N)).movedim(2, 0) for grad in grads)

    def gap(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).abs().max() / max(1.0, float(wanted.abs().max())))

    assert gap(out, wanted.detach()) < TOLERANCE
    assert gap(dq, dq_all[list(own)]) < TOLERANCE
    # A chunk's keys have two gradients: from its own queries (exact), and from those of later own chunks.
    for chunk in range(CHUNKS):
        dk, dv = torch.zeros(2, B, H, N, D, dtype=torch.float64)
        if chunk in own:
            dk, dv = dk + dk_own[own.index(chunk)], dv + dv_own[own.index(chunk)]
        if chunk < own[-1]:
            dk, dv = dk + far[2 * chunk], dv + far[2 * chunk + 1]
        assert gap(dk, dk_all[chunk]) < TOLERANCE
        assert gap(dv, dv_all[chunk]) < TOLERANCE


@pytest.mark.parametrize("own", [(3,), (0, 3), (2, 3)])
def test_the_order_of_arrival_changes_no_bit(own: tuple[int, ...]) -> None:
    """In float32, where sums in another order do differ."""
    wanted_out, wanted_grads = chunked(own, (0, 1, 2), torch.float32)
    for arrival in itertools.permutations(range(3)):
        out, grads = chunked(own, arrival, torch.float32)
        assert torch.equal(out, wanted_out)
        assert all(torch.equal(*pair) for pair in zip(grads, wanted_grads, strict=True))


def test_scores_far_apart_do_not_overflow() -> None:
    """One block may outweigh another by more than exp can hold."""
    q = torch.full((1, 1, 1, 1, 2), 40.0)
    attention = ChunkAttention(q, {0: 0}, local=False)
    attention.attend_own(-q, torch.zeros_like(q), torch.zeros(()))
    attention.attend_far(0, q[0] * 40.0, torch.ones_like(q[0]))
    assert torch.equal(attention.merge(), torch.ones_like(q))


def test_a_block_that_never_came_is_our_own_fault() -> None:
    q = torch.zeros(1, 1, 1, 1, 2)
    attention = ChunkAttention(q, {0: 0}, local=False)
    attention.attend_own(q, q, torch.zeros(()))
    with pytest.raises(AssertionError):
        attention.merge()
