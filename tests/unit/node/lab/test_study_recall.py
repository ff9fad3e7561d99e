"""The recall probe: what it asks for can be known, only from far back, and is the same on every node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.small import small_model
from helpers.worlds import WORLDS, exchange_of, full_spec, tiny_config

from netem.config import convert
from netem.errors import ConfigError
from node.config import Config
from node.data import DataConfig, open_data
from node.data.recall import FACT_KEYS, KEYS, VALUES, Recall
from node.data.task import NOT_ASKED, asked, count_asked, read
from node.train.evaluate import heldout_loss
from node.train.from_config import drawn_model
from node.train.passes import loss_sum

TASK = Recall()
CONTEXT, PART = 256, 16


def test_entries_say_what_is_read_and_what_is_asked_for() -> None:
    entries = np.array([[3, -1, -8, 0]])
    assert read(entries).tolist() == [[3, 0, 7, 0]]
    assert asked(entries).tolist() == [[3, NOT_ASKED, NOT_ASKED, 0]]
    assert count_asked(entries) == 1  # the first token of a context is no target


def test_contexts_are_a_function_of_seed_and_number() -> None:
    batch = TASK.sampler(CONTEXT, 4, 7).contexts(8)
    assert batch.shape == (4, CONTEXT + 1)
    assert (TASK.sampler(CONTEXT, 1, 7).contexts(10)[0] == batch[2]).all()
    assert (TASK.sampler(CONTEXT, 4, 8).contexts(8) != batch).mean() > 0.5
    assert read(batch).min() >= 0
    assert read(batch).max() < TASK.vocab_size


def test_what_is_held_out_is_another_stream_and_the_same_for_every_seed() -> None:
    held = TASK.heldout_contexts(CONTEXT, 0, 64)
    assert (TASK.heldout_contexts(CONTEXT, 5, 2) == held[5:7]).all()
    trained = {row.tobytes() for row in TASK.sampler(CONTEXT, 64, 0).contexts(0)}
    assert not trained & {row.tobytes() for row in held}


@pytest.mark.parametrize("context", [64, 256, 512, 2048])
def test_all_that_is_asked_for_stands_more_than_a_part_back(context: int) -> None:
    """Not one answer can be found in the last part's length of tokens before it, and each can be found before that."""
    part = context // 16
    for row in TASK.heldout_contexts(context, 0, 50):
        tokens, targets = read(row), asked(row)
        places = np.flatnonzero(targets != NOT_ASKED)
        assert len(places) > min(context // 16, 40)
        for place in places:
            key = tokens[place - 1] - VALUES
            assert 0 <= key < FACT_KEYS + KEYS
            planted = VALUES + FACT_KEYS + KEYS + key * VALUES + tokens[place]
            near = tokens[place - part - 1 : place - 1].tolist()
            assert planted not in near
            assert tokens[place - 1] not in near
            assert (tokens[:place] == planted).sum() == 1
        end = context - 2 * min(part // 2, FACT_KEYS)
        first, last = places[places <= end], places[places > end]
        assert (tokens[first - 1] >= VALUES + FACT_KEYS).all()
        assert (tokens[last - 1] < VALUES + FACT_KEYS).all()  # facts: planted in the first part
        assert len(last) == min(part // 2, FACT_KEYS)


def test_answers_are_uniform() -> None:
    held = TASK.heldout_contexts(CONTEXT, 0, 400)
    targets = held[held >= 0]
    shares = np.bincount(targets, minlength=VALUES) / targets.size
    assert len(shares) == VALUES
    assert abs(shares - 1 / VALUES).max() < 0.2 / VALUES


def test_loss_counts_what_is_asked_for_only() -> None:
    config = tiny_config(model={"context": 64, "chunks": 16})
    model, exchange, spec = small_model(config), exchange_of(config, [list(range(16))], 0, None), full_spec(config)
    entries = TASK.heldout_contexts(64, 0, 2) % 64  # the small model's vocabulary; all asked for
    masked = entries.copy()
    masked[:, 40:] = -1 - masked[:, 40:]
    with torch.no_grad():
        whole = loss_sum(model, exchange, entries, spec)
        part = loss_sum(model, exchange, masked, spec)
        nothing = loss_sum(model, exchange, -1 - entries, spec)
    assert 0 < part < whole
    assert nothing == 0


def test_the_heldout_loss_is_a_mean_over_what_is_asked_for() -> None:
    config = tiny_config(model={"context": 64, "chunks": 16, "d_model": 32})

    model = drawn_model(config, TASK.vocab_size)
    spec = full_spec(config)._replace(compressed=False)
    exchange = exchange_of(config, [list(range(16))], 0, None)
    total, count = heldout_loss(model, exchange, TASK, spec, 2, 3)
    assert count == count_asked(TASK.heldout_contexts(64, 0, 6))
    assert total / count == pytest.approx(np.log(TASK.vocab_size), rel=0.1)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"model\.context = 32: the recall probe is made of 16 parts"):
        TASK.sampler(32, 1, 0)
    with pytest.raises(ConfigError, match=r"model\.chunks = 4: the recall probe asks for what lies a 16th"):
        convert(Config, {"data": {"corpus": "recall"}})
    assert open_data(DataConfig(corpus="recall")).vocab_size == TASK.vocab_size
    assert WORLDS  # the worlds module sets one torch thread
