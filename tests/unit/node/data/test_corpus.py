"""The joint of the data room: which tokens are trained on, which are evaluated, and what `open_data` opens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from netem.errors import ConfigError
from node.data import BatchSampler, Corpus, DataConfig, heldout_contexts, heldout_count, make_tokenizer, open_data
from node.data.task import begins, read

TRAIN = np.arange(1000, dtype=np.uint16)
HELDOUT = np.arange(5000, 5100, dtype=np.uint16)
CONTEXT = 16


@pytest.fixture
def corpus() -> Corpus:
    """Training and held-out tokens that have no token in common, so that a mix-up shows."""
    return Corpus(TRAIN, HELDOUT, make_tokenizer("gpt2"), "fingerprint")


def test_the_heldout_walk_reads_heldout_tokens_only(corpus: Corpus) -> None:
    count = corpus.heldout_count(CONTEXT)
    assert count == 6
    walk = corpus.heldout_contexts(CONTEXT, 0, count)
    np.testing.assert_array_equal(walk, heldout_contexts(HELDOUT, CONTEXT, 0, 6))
    assert np.isin(walk, HELDOUT).all()
    # Not one context more, though the training part would have it.
    assert corpus.heldout_contexts(CONTEXT, count, 4).shape == (0, CONTEXT + 1)
    np.testing.assert_array_equal(corpus.heldout_contexts(CONTEXT, 2, 3), walk[2:5])


def test_training_reads_training_tokens_only(corpus: Corpus) -> None:
    sampler = corpus.sampler(CONTEXT, 4, seed=3)
    batch = sampler.contexts(8)
    np.testing.assert_array_equal(batch, BatchSampler(TRAIN, CONTEXT, 4, 3).contexts(8))
    assert np.isin(batch, TRAIN).all()
    assert (sampler.context, batch.shape) == (CONTEXT, (4, CONTEXT + 1))


def test_each_part_is_too_short_on_its_own(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="held-out part of the corpus has 100 tokens"):
        corpus.heldout_count(100)
    corpus.sampler(100, 1, 0)
    with pytest.raises(ConfigError, match="training part of the corpus has 1000 tokens"):
        corpus.sampler(1000, 1, 0)


def test_a_corpus_says_what_it_is(corpus: Corpus) -> None:
    assert corpus.vocab_size == 50257
    assert corpus.summary == "1000 training and 100 held-out tokens"


def test_what_is_opened_evaluates_text_that_it_does_not_train_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("t" * 900 + "h" * 100)
    corpus = open_data(DataConfig(corpus=str(path), tokenizer="bytes", cache=str(tmp_path / "cache")))
    count = corpus.heldout_count(CONTEXT)
    assert count == heldout_count(np.zeros(101, np.uint16), CONTEXT)  # the tail and its end-of-text
    assert set(corpus.heldout_contexts(CONTEXT, 0, count).ravel()) == {ord("h")}
    batches = corpus.sampler(CONTEXT, 50, seed=0).contexts(0)
    assert set(batches.ravel()) <= {ord("t"), corpus.vocab_size - 1}


def test_reading_stops_where_the_config_says(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("t" * 1000)
    config = DataConfig(corpus=str(path), tokenizer="bytes", max_tokens=100, cache=str(tmp_path / "cache"))
    assert open_data(config).summary == "91 training and 11 held-out tokens"  # with an end-of-text each


@pytest.mark.parametrize("masking", [True, False])
def test_contexts_tell_where_documents_begin_where_attention_stays_within_them(tmp_path: Path, masking: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("|".join(f"text {number}" for number in range(300)))
    config = DataConfig(
        corpus=str(path), tokenizer="bytes", separator="|", document_masking=masking, cache=str(tmp_path / "cache")
    )
    corpus = open_data(config)
    assert ("9 in a training document (data.document_tokens)" in corpus.summary) == masking
    for contexts in (corpus.sampler(CONTEXT, 4, seed=0).contexts(0), corpus.heldout_contexts(CONTEXT, 0, 4)):
        follows = read(contexts)[:, :-1] == 256
        assert follows.sum() >= 4
        assert (begins(contexts)[:, 1:] == (follows & masking)).all()
        assert not begins(contexts)[:, 0].any()  # what came before it is not known


def test_novels_and_text_need_no_heavy_import(tmp_path: Path) -> None:
    script = """
import sys
from node.data import DataConfig, open_data
open_data(DataConfig(cache=sys.argv[1]))
print([name for name in ("torch", "datasets", "pyarrow", "transformers") if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout
    assert found == "[]\n"
