"""Blocks of attention against softmax and autograd. Tolerances leave room over what was measured, and say it."""

import pytest
import torch
from torch import Tensor

from node.model.kernels import block_backward, block_forward, plain_backward, plain_forward

B, H, D = 2, 3, 8
TOLERANCE = 1e-12  # relative to the largest entry, in float64; measured: 1e-15


def tensors(*lengths: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(B, H, length, D, generator=source, dtype=dtype) for length in lengths]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / D**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def gap(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("forward", [block_forward, plain_forward])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (7, 7, False), (12, 5, False), (1, 1, True)])
def test_a_block_is_softmax_attention_with_its_log_sum_exp(forward, queries: int, keys: int, causal: bool) -> None:
    q, k, v = tensors(queries, keys, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    out, lse = forward(q, k, v, causal)
    scores = q @ k.mT / D**0.5
    wanted = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    assert gap(out, softmax_attention(q, k, v, mask)) < TOLERANCE
    assert gap(lse, wanted.logsumexp(-1)) < TOLERANCE


@pytest.mark.parametrize("keys", [1, 8, 15, 16, 40])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_nan_is_not_hidden(where: str, keys: int) -> None:
    """However few keys there are: it must show in this step, not in the next."""
    q, k, v = tensors(4, keys, keys, dtype=torch.float32)
    (q[0, 0, 2] if where == "query" else k[0, 0]).fill_(float("nan"))
    out, lse = block_forward(q, k, v, causal=False)
    assert out[0, 0, 2].isnan().all()
    assert lse[0, 0, 2].isnan()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("backward", [block_backward, plain_backward])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (12, 5, False)])
def test_a_block_alone_has_the_gradients_of_autograd(backward, queries: int, keys: int, causal: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(queries, keys, keys))
    (dout,) = tensors(queries)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    wanted = torch.autograd.grad(softmax_attention(q, k, v, mask), (q, k, v), dout)
    with torch.no_grad():
        out, lse = plain_forward(q, k, v, causal)
        found = backward(dout, q, k, v, out, lse, causal)
    assert max(gap(*pair) for pair in zip(found, wanted, strict=True)) < TOLERANCE


@pytest.mark.parametrize("backward", [block_backward, plain_backward])
def test_blocks_with_the_merged_output_have_the_gradients_of_one_softmax_over_all(backward) -> None:
    q, k_own, v_own, k_far, v_far = (tensor.requires_grad_() for tensor in tensors(6, 6, 6, 9, 9))
    (dout,) = tensors(6)
    mask = torch.cat((torch.ones(6, 9, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool).tril()), 1)
    merged = softmax_attention(q, torch.cat((k_far, k_own), 2), torch.cat((v_far, v_own), 2), mask)
    wanted = torch.autograd.grad(merged, (q, k_own, v_own, k_far, v_far), dout)
    with torch.no_grad():
        lse = torch.logaddexp(plain_forward(q, k_own, v_own, True)[1], plain_forward(q, k_far, v_far, False)[1])
        dq_own, *own = backward(dout, q, k_own, v_own, merged, lse, True)
        dq_far, *far = backward(dout, q, k_far, v_far, merged, lse, False)
    found = (dq_own + dq_far, *own, *far)
    assert max(gap(*pair) for pair in zip(found, wanted, strict=True)) < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, TOLERANCE), (torch.float32, 1e-5), (torch.bfloat16, 0.03)],  # measured: 1e-15, 2e-7, 1.1e-2
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_fused_and_plain_agree(dtype: torch.dtype, tolerance: float, causal: bool) -> None:
    q, k, v, dout = tensors(16, 16, 16, 16, dtype=dtype)
    fused, plain = block_forward(q, k, v, causal), plain_forward(q, k, v, causal)
    assert [t.dtype for t in fused] == [t.dtype for t in plain]
    backs = [backward(dout, q, k, v, *plain, causal) for backward in (block_backward, plain_backward)]
    pairs = [*zip(fused, plain, strict=True), *zip(*backs, strict=True)]
    assert max(gap(found.double(), wanted.double()) for found, wanted in pairs) < tolerance


def fewer(x: Tensor, heads: int) -> Tensor:
    """The first heads of a tensor, in memory as the model has them: those of a token side by side."""
    return x[:, :heads].transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "causal"), [(40, 40, True), (70, 20, False)])
def test_heads_that_are_shared_are_heads_that_are_repeated(
    queries: int, keys: int, causal: bool, dtype: torch.dtype, kv_heads: int
) -> None:
    """To the last bit, forward and backward; a head's gradient is the sum over the queries that read it."""
    source = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(B, 4, queries, D, generator=source, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (fewer(torch.randn(B, 4, keys, D, generator=source, dtype=torch.float64), kv_heads).to(dtype) for _ in "kv")
    groups = 4 // kv_heads
    repeated = [x.repeat_interleave(groups, 1) for x in (k, v)]
    out, lse = block_forward(q, k, v, causal)
    wanted_out, wanted_lse = block_forward(q, *repeated, causal)
    assert torch.equal(out, wanted_out)
    assert torch.equal(lse, wanted_lse)
    dq, dk, dv = block_backward(dout, q, k, v, out, lse, causal)
    wanted_dq, *wanted = block_backward(dout, q, *repeated, wanted_out, wanted_lse, causal)
    assert torch.equal(dq, wanted_dq)
    for found, whole in zip((dk, dv), wanted, strict=True):
        assert torch.equal(found, whole.unflatten(1, (kv_heads, groups)).sum(2))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layout_of_keys_and_values_changes_no_bit(causal: bool, kv_heads: int) -> None:
    """A codec's product may have a token's numbers apart, which torch's kernel would read wrongly and not say so."""
    q, k, v, dout = tensors(20, 20, 20, 20, dtype=torch.float32)
    k, v = k[:, :kv_heads].contiguous(), v[:, :kv_heads].contiguous()
    k_apart, v_apart = (x.mT.contiguous().mT for x in (k, v))
    out, lse = block_forward(q, k, v, causal)
    assert torch.equal(block_forward(q, k_apart, v_apart, causal)[0], out)
    wanted = block_backward(dout, q, k, v, out, lse, causal)
    found = block_backward(dout, q, k_apart, v_apart, out, lse, causal)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_on_a_gpu_the_calls_fit_the_signatures_of_torch(dtype: torch.dtype, causal: bool) -> None:
    """Meta tensors take the way of a GPU's: arguments are matched to the operators' schemas, and shapes come out."""
    q, k, v, dout = (tensor.to("meta", dtype) for tensor in tensors(16, 16, 16, 16))
    out, lse = block_forward(q, k, v, causal)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    grads = block_backward(dout, q, k, v, out, lse, causal)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(q.shape, dtype)] * 3
    q, k, v, dout = (tensor.to("meta", dtype) for tensor in tensors(16, 16, 16, 16))
    k, v = k[:, :1], v[:, :1]
    out, lse = block_forward(q, k, v, causal)
    grads = block_backward(dout, q, k, v, out, lse, causal)
    assert [tuple(x.shape) for x in (out, *grads)] == [tuple(x.shape) for x in (q, q, k, v)]
