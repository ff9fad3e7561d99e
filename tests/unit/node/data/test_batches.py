"""Contexts: a function of (seed, number) alone, in bounds, and a held-out walk that meets each target once."""

from __future__ import annotations

import numpy as np
import pytest

from netem.errors import ConfigError
from node.data.batches import BatchSampler, heldout_contexts, heldout_count

TOKENS = np.arange(10_000, dtype=np.uint16)  # each token is its own position


def sampler(context: int = 16, batch: int = 4, seed: int = 7) -> BatchSampler:
    return BatchSampler(TOKENS, context, batch, seed)


def test_batches_are_inputs_with_their_next_tokens() -> None:
    batch = sampler().contexts(0)
    assert batch.shape == (4, 17)
    assert batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()


def test_a_resumed_run_reads_what_the_uninterrupted_one_would_have() -> None:
    uninterrupted = sampler()
    batches = [uninterrupted.contexts(cursor) for cursor in range(0, 40, 4)]
    resumed = sampler()
    for step in (9, 5, 6):  # in any order: nothing is remembered
        np.testing.assert_array_equal(resumed.contexts(4 * step), batches[step])


def test_a_context_is_the_same_in_a_batch_of_any_size() -> None:
    one_by_one = np.concatenate([sampler(batch=1).contexts(number) for number in range(12)])
    np.testing.assert_array_equal(sampler(batch=12).contexts(0), one_by_one)
    np.testing.assert_array_equal(sampler(batch=5).contexts(3), one_by_one[3:8])


def test_the_draw_is_pinned() -> None:
    """Golden figures: a change here means that no old checkpoint resumes on the same data."""
    assert [sampler().start(number) for number in (0, 1, 2, 1_000_000)] == [826, 3809, 8887, 345]


def test_seeds_and_numbers_give_different_contexts() -> None:
    starts = {sampler(seed=seed).start(number) for seed in range(10) for number in range(10)}
    assert len(starts) > 90


def test_draws_cover_all_places_evenly_and_stay_in_bounds() -> None:
    short = BatchSampler(TOKENS[:20], 16, 1, 0)
    starts = [short.start(number) for number in range(2000)]
    counts = np.bincount(starts)
    assert len(counts) == 4  # 0 to 3: 3 + 17 tokens reach the end
    assert counts.min() > 400
    assert short.contexts(0).max() < 20


def test_the_last_place_is_the_only_one_of_a_corpus_of_one_context() -> None:
    assert BatchSampler(TOKENS[:17], 16, 1, 0).contexts(5).tolist() == [list(range(17))]


def test_the_largest_seed_and_a_far_cursor_are_fine() -> None:
    assert sampler(seed=2**64 - 1).contexts(2**62).shape == (4, 17)


def test_a_corpus_shorter_than_the_context_names_both_lengths() -> None:
    with pytest.raises(ConfigError, match=r"model\.context = 16: .*training part.* 16 tokens.* 17 .*shorter.*larger"):
        BatchSampler(TOKENS[:16], 16, 1, 0)
    with pytest.raises(ConfigError, match=r"model\.context = 16: .*held-out part.* 3 tokens.* 17 "):
        heldout_contexts(TOKENS[:3], 16, 0, 1)


def test_the_heldout_walk_meets_each_target_once() -> None:
    tokens = TOKENS[:100]
    assert heldout_count(tokens, 16) == 6
    walk = heldout_contexts(tokens, 16, 0, 6)
    assert walk.dtype == np.int64
    assert walk[:, 1:].ravel().tolist() == list(range(1, 97))
    assert walk[:, :-1].ravel().tolist() == list(range(96))


def test_the_heldout_walk_may_be_taken_in_parts_and_ends() -> None:
    tokens = TOKENS[:100]
    whole = heldout_contexts(tokens, 16, 0, 6)
    parts = [heldout_contexts(tokens, 16, first, 4) for first in (0, 4, 8)]
    assert [len(part) for part in parts] == [4, 2, 0]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_heldout_walk_uses_a_corpus_of_exactly_one_context() -> None:
    assert heldout_count(TOKENS[:17], 16) == 1
    assert heldout_count(TOKENS[:33], 16) == 2
    assert heldout_count(TOKENS[:32], 16) == 1
