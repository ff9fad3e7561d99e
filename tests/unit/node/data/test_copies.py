"""The probe of copies: what it asks for stands far back, and contexts are the same on every node."""

from __future__ import annotations

import numpy as np
import pytest

from netem.config import convert
from netem.errors import ConfigError
from node.config import Config
from node.data import Task, open_data
from node.data.copies import KNOWN, LEAST, PASSAGES, Copies
from node.data.task import NOT_ASKED, asked, read

CONTEXT = 512


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    cache = str(tmp_path_factory.mktemp("cache"))
    data = {"corpus": "copies", "tokenizer": "bytes", "cache": cache}
    config = convert(Config, {"model": {"chunks": 8}, "data": data})
    found: Task = open_data(config.data)
    assert isinstance(found, Copies)
    return found


def test_all_that_is_asked_for_stands_far_back(task: Copies) -> None:
    tokens, distances = task.heldout(CONTEXT, 0, 8)
    for row, back in zip(tokens, distances, strict=True):
        places = np.flatnonzero(back)
        assert len(places) >= PASSAGES * (CONTEXT // LEAST - KNOWN)
        assert back[places].min() >= CONTEXT // 4
        assert (row[places] == row[places - back[places]]).all()
        assert (row[places - 1] == row[places - back[places] - 1]).all()  # and what comes before it stands there too
    entries = task.heldout_contexts(CONTEXT, 0, 8)
    assert (read(entries) == tokens).all()
    assert ((asked(entries) != NOT_ASKED) == (np.stack(distances) > 0)).all()


def test_contexts_are_a_function_of_seed_and_number(task: Copies) -> None:
    batch = task.sampler(CONTEXT, 4, 7).contexts(8)
    assert batch.shape == (4, CONTEXT + 1)
    assert (task.sampler(CONTEXT, 1, 7).contexts(10)[0] == batch[2]).all()
    assert (task.sampler(CONTEXT, 4, 8).contexts(8) != batch).mean() > 0.5
    held = task.heldout_contexts(CONTEXT, 0, 6)
    assert (task.heldout_contexts(CONTEXT, 3, 2) == held[3:5]).all()


def test_a_context_that_is_too_short_is_refused(task: Copies) -> None:
    with pytest.raises(ConfigError, match=r"model\.context = 64: the probe of copies"):
        task.sampler(64, 1, 0)


def test_chunks_that_reach_back_to_what_is_copied_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.chunks = 4: the probe of copies"):
        convert(Config, {"model": {"context": 512, "chunks": 4}, "data": {"corpus": "copies"}})
