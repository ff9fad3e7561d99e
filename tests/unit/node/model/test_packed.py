"""Attention within documents: what N nodes compute is what one does, and what each document alone would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.coordinated import documents, train
from helpers.packed import DOCUMENT_MODES, ENDS, by_token, documents_of, masking_config, packed, spans
from helpers.small import VOCAB, largest_difference, relative_difference, small_model
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, exchange_of, full_spec, loss_and_gradients, tiny_config
from torch import Tensor

from node.config import Config
from node.data.batches import Contexts
from node.data.task import asked, begins, count_asked, read
from node.model.llama import Llama, Step
from node.model.rectangles import Rectangle, attend, attend_backward
from node.train.evaluate import heldout_loss
from node.train.passes import loss_sum, own_tokens

LOSS_WITHIN, GRADIENTS_WITHIN = 1e-6, 2e-6
GRADIENTS_IN_FORMATS = {
    "float32": 1e-6,
    "bfloat16": 3e-3,
    "int8": 0.01,
    "fp8": 0.05,
    "int4": 0.15,
    "int2": 1.0,
    "topk10": 0.5,
}

FIRST_PLACE = {"zigzag": 0, "1": 1, "3+1": 2, "4": 3}
"""The first place in a context at which a token is changed; a chunk begins at 8, and ends at 7."""


def alone(config: Config, contexts: Contexts) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a plain Llama that reads every document by itself, from position 0 on."""
    model = Llama(config.model, VOCAB, config.run.seed)
    total = torch.zeros(())
    for context, begin, end in spans(contexts):
        ids = torch.from_numpy(read(contexts[context, begin:end]))[None]
        targets = torch.from_numpy(asked(contexts[context, begin + 1 : end + 1]))
        logits = model(ids, Step(model.rope(ids.device), torch.arange(end - begin)))
        total = total + F.cross_entropy(logits[0], targets, reduction="sum", ignore_index=-100)
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", WORLDS)
def test_nodes_compute_what_each_document_alone_gives(world: str) -> None:
    """K and V sent whole: against a plain Llama without chunks, without masks, and with positions from 0 on."""
    config = masking_config("dense")
    contexts = packed(config)
    wanted_loss, wanted = alone(config, contexts)
    loss, found = loss_and_gradients(config, WORLDS[world], contexts)
    assert loss == pytest.approx(wanted_loss, rel=LOSS_WITHIN)
    assert largest_difference(found, wanted) < 1e-5  # RoPE by other positions, in float32


@pytest.mark.parametrize("mode", DOCUMENT_MODES)
def test_n_nodes_equal_one(mode: str) -> None:
    config = masking_config(mode)
    contexts = packed(config)
    wanted_loss, wanted = loss_and_gradients(config, WORLDS["1"], contexts)
    for name, world in WORLDS.items():
        loss, found = loss_and_gradients(config, world, contexts)
        assert loss == pytest.approx(wanted_loss, rel=LOSS_WITHIN), name
        assert largest_difference(found, wanted) < GRADIENTS_WITHIN, name


@pytest.mark.parametrize("format", GRADIENTS_IN_FORMATS)
def test_formats_round_rows_as_they_round_chunks(format: str) -> None:
    """One function of the tokens on one node and on four; gradients as near as the format allows."""
    config = masking_config(compress={"format": format, "dense_format": "float32"})
    contexts = packed(config)
    one, _ = loss_and_gradients(config, WORLDS["1"], contexts)
    four, found = loss_and_gradients(config, WORLDS["4"], contexts)
    assert four == pytest.approx(one, rel=LOSS_WITHIN)
    exact = masking_config(compress={"dense_format": "float32"})
    _, wanted = loss_and_gradients(exact, WORLDS["1"], contexts)
    assert relative_difference(found, wanted) < GRADIENTS_IN_FORMATS[format]


@pytest.mark.parametrize("world", ["1", "zigzag", "4"])
@pytest.mark.parametrize("mode", ["dense", "geodesic", "learned"])
def test_passes_that_overlap_and_layers_that_are_computed_again_change_nothing(mode: str, world: str) -> None:
    """Each pass has documents of its own, and so readers of its own."""
    plain = masking_config(mode)
    contexts = packed(plain)
    wanted_loss, wanted = loss_and_gradients(plain, WORLDS["1"], contexts)
    for settings in ({"train": {"micro_batches": 4}}, {"run": {"recompute": True}}):
        loss, found = loss_and_gradients(masking_config(mode, **settings), WORLDS[world], contexts)
        assert loss == pytest.approx(wanted_loss, rel=LOSS_WITHIN)
        assert largest_difference(found, wanted) < GRADIENTS_WITHIN


def test_a_context_of_one_document_is_a_context_without_documents() -> None:
    config = masking_config()
    contexts = packed(config, ends=[()] * 4)
    for world in ("1", "4"):
        loss, found = loss_and_gradients(config, WORLDS[world], contexts)
        wanted_loss, wanted = loss_and_gradients(tiny_config(train={"batch": 4}), WORLDS[world], contexts)
        assert loss == pytest.approx(wanted_loss, rel=LOSS_WITHIN)
        assert largest_difference(found, wanted) < GRADIENTS_WITHIN


def all_logits(config: Config, world: str, variants: list[Contexts]) -> list[Tensor]:
    """Logits [B, T, vocab] of each of these batches."""

    def work(rank: int, wire: ThreadWire) -> list[Tensor]:
        model, exchange = small_model(config), exchange_of(config, WORLDS[world], rank, wire)
        found = []
        for contexts in variants:
            inputs, _ = own_tokens(contexts, exchange.own, full_spec(config), torch.device("cpu"))
            with torch.no_grad():
                handle = exchange.begin(full_spec(config), trains=False, documents=documents_of(config, contexts))
                found.append(model.logits(inputs, handle))
                handle.finish_forward()
        return found

    parts = run_ranks(len(WORLDS[world]), work)
    return [by_token([part[number] for part in parts], WORLDS[world]) for number in range(len(variants))]


def changed(contexts: Contexts, place: int) -> Contexts:
    """Another token at `place` of every context: one that is no end-of-text, and ends no document where it stood."""
    other = contexts.copy()
    ordinary = (read(contexts)[:, place] != VOCAB - 1) & ~begins(contexts)[:, place]
    other[ordinary, place] = (other[ordinary, place] + 1) % (VOCAB - 1)
    return other


@pytest.mark.parametrize("world", FIRST_PLACE)
@pytest.mark.parametrize("mode", DOCUMENT_MODES)
def test_a_token_changes_only_what_follows_it_in_its_document(mode: str, world: str) -> None:
    """To the bit: no logit of another document, and no logit before it. A test takes every fourth place, and the four
    tests of a mode take them all."""
    config = masking_config(mode)
    contexts, places = packed(config), range(FIRST_PLACE[world], 32, 4)
    base, *others = all_logits(config, world, [contexts, *(changed(contexts, place) for place in places)])
    chunk = config.model.chunk_tokens
    for place, logits in zip(places, others, strict=True):
        differs_BT = (logits != base).any(-1).numpy()
        for context, begin, end in spans(contexts):
            if begin <= place < end and changed(contexts, place)[context, place] != contexts[context, place]:
                stop = end if mode != "local" else min(end, (place // chunk + 1) * chunk)
                wanted = np.zeros(32, bool)
                wanted[place:stop] = True
                assert (differs_BT[context] == wanted).all(), (context, place)


def test_a_document_that_ends_later_or_earlier_changes_nothing_before_it() -> None:
    """A new end-of-text changes the shapes of later products, and so, where kernels cut them otherwise, last bits."""
    config = masking_config("geodesic")
    contexts = packed(config)
    cut = packed(config, ends=[(*ends, 27) for ends in ENDS])
    for world in ("1", "4"):
        base, other = all_logits(config, world, [contexts, cut])
        torch.testing.assert_close(other[:, :27], base[:, :27], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", ["1", "4", "zigzag"])
@pytest.mark.parametrize("mode", DOCUMENT_MODES)
def test_gradients_across_documents_are_exactly_zero(mode: str, world: str) -> None:
    """Each document has ids of its own, and only one is asked for: nothing reaches the embeddings of the others."""
    config = masking_config(mode, batch=1, model={"tied": False})
    contexts = packed(config, ends=[(10, 20)])
    ids = np.concatenate([np.arange(0, 11), np.arange(20, 30), np.arange(40, 52)])
    marks = begins(contexts[0])
    for begin, end in ((0, 11), (11, 21), (21, 33)):
        entries = np.where((np.arange(33) >= begin) & (np.arange(33) < end), ids, -1 - ids)
        entries[marks] = contexts[0, marks] + read(contexts[0, marks]) - ids[marks]
        _, found = loss_and_gradients(config, WORLDS[world], entries[None])
        reached = found["embed_tokens.weight"].abs().sum(1).nonzero().flatten().tolist()
        # The last token of a document has no target in it, and so no gradient but as a key.
        assert set(reached) <= set(ids[begin:end].tolist())
        assert len(reached) >= end - begin - 1


def test_theta_is_of_the_rows_that_are_sent() -> None:
    config = masking_config("geodesic")
    contexts, lying = packed(config), documents_of(config, packed(config))
    seen: list[tuple[Tensor, Tensor]] = []
    model = small_model(config)
    codec = next(codec for _, codec in model.codecs())
    compress = codec.compress
    codec.compress = lambda z, theta: seen.append((z, theta)) or compress(z, theta)  # type: ignore[method-assign]
    with torch.no_grad():
        loss_sum(model, exchange_of(config, WORLDS["1"], 0, None), contexts, full_spec(config))
        z, theta = seen[0]
        assert codec.psi is not None
        for chunk in range(3):
            for context, begin in enumerate(lying.tail_begins(chunk)):
                rows = z[chunk, context, begin:]
                mean = rows.mean(0) if len(rows) else torch.zeros_like(z[0, 0, 0])
                wanted = (mean.unsqueeze(-2) * codec.psi).sum(-1).clamp(-codec.clip, codec.clip).flatten()
                torch.testing.assert_close(theta[chunk, context], wanted)


def test_rectangles_are_a_block_under_a_mask() -> None:
    torch.manual_seed(0)
    q, dout = torch.randn(2, 4, 12, 8), torch.randn(2, 4, 12, 8)
    k, v = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    rectangles = [Rectangle(0, slice(0, 5), slice(13, 20)), Rectangle(1, slice(4, 12), slice(0, 20))]
    mask = torch.zeros(2, 1, 12, 20, dtype=torch.bool)
    for entry, queries, keys in rectangles:
        mask[entry, :, queries, keys] = True
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    wanted = torch.softmax(scores, -1).nan_to_num() @ leaves[2].repeat_interleave(2, 1)
    out, lse = attend(q, k, v, False, rectangles)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-6)
    sees = mask.any(-1).expand(2, 4, 12).unsqueeze(-1)
    wanted.backward(torch.where(sees, dout, 0).double())
    grads = attend_backward(dout, q, k, v, out, lse, False, rectangles)
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad.float(), rtol=1e-4, atol=1e-5)
    assert not grads[0][0, :, 5:].any()
    assert not grads[1][0, :, :13].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_log_sum_exp_is_as_exact_as_that_of_a_whole_block(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=dtype) for _ in "qkv")
    whole = attend(q, k, v, False, None)
    parts = attend(q, k, v, False, [Rectangle(0, slice(0, 20), slice(0, 20))])
    for found, wanted in zip(parts, whole, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_runs_of_n_nodes_train_evaluate_and_calibrate_as_one(tmp_path: Path) -> None:
    """Six steps: warm start, basis, compressed steps, evaluations, several passes in flight."""
    config = masking_config(train={"sync_every": 1, "micro_batches": 2, "eval_every": 2})
    one, _ = train(config, WORLDS["1"], tmp_path)
    for world in ("4", "zigzag"):
        many, _ = train(config, WORLDS[world], tmp_path)
        assert many.losses() == pytest.approx(one.losses(), rel=1e-5)
        for step, (metrics, _) in one.said[0].items():
            if metrics and "heldout_loss_sum" in metrics:
                parts = [by_step[step][0] or {} for by_step in many.said]
                for key in ("heldout_loss_sum", "heldout_tokens"):
                    assert sum(part[key] for part in parts) == pytest.approx(metrics[key], rel=1e-5)
    joined, _ = train(tiny_config(train={"batch": 4, "sync_every": 1}), WORLDS["1"], tmp_path)
    assert abs(joined.losses()[0] / one.losses()[0] - 1) > 1e-5, "documents change nothing"


def test_the_heldout_loss_counts_no_first_token_of_a_document() -> None:
    config, task = masking_config("dense", batch=2), documents()
    total, count = heldout_loss(
        small_model(config), exchange_of(config, WORLDS["1"], 0, None), task, full_spec(config), 2, 3
    )
    walk = task.heldout_contexts(32, 0, 6)
    ends = int((task.heldout[: 6 * 32] == task.tokenizer.eot).sum())
    assert ends > 6
    assert count == count_asked(walk) == 6 * 32 - ends
    assert total == pytest.approx(alone(config, walk)[0], rel=LOSS_WITHIN)
