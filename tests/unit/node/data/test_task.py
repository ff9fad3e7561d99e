"""What training asks of a source of contexts: full batches, room for them, and which tokens count."""

from __future__ import annotations

import numpy as np
import pytest

from netem.errors import ConfigError
from node.data import Corpus, make_tokenizer
from node.data.task import NOT_ASKED, asked, begins, check_room, count_asked, heldout_batches, mark_documents, read

CONTEXT = 10


def corpus(train: int, heldout: int) -> Corpus:
    parts = (np.zeros(length, dtype=np.uint16) for length in (train, heldout))
    return Corpus(*parts, make_tokenizer("bytes"), "")


def test_only_full_batches_are_evaluated() -> None:
    task = corpus(100, 5 * CONTEXT + 1)
    assert [heldout_batches(task, CONTEXT, batch) for batch in (1, 2, 3, 5)] == [5, 2, 1, 1]
    with pytest.raises(ConfigError, match=r"train\.batch = 6: .*only 5 contexts of model\.context = 10"):
        heldout_batches(task, CONTEXT, 6)


@pytest.mark.parametrize(
    ("train", "heldout", "complaint"),
    [
        (CONTEXT, 99, "the training part of the corpus has 10 tokens"),
        (99, CONTEXT, "the held-out part of the corpus has 10 tokens"),
        (99, CONTEXT + 1, "only 1 contexts"),
    ],
)
def test_a_task_without_room_is_refused_before_training(train: int, heldout: int, complaint: str) -> None:
    check_room(corpus(CONTEXT + 1, 2 * CONTEXT + 1), CONTEXT, 2)
    with pytest.raises(ConfigError, match=complaint):
        check_room(corpus(train, heldout), CONTEXT, 2)


def test_the_two_meanings_of_an_entry_are_taken_apart() -> None:
    entries = np.array([[3, -1, -6, 0], [-4, 2, 7, -1]])  # −1 − id: read, and not asked for
    assert read(entries).tolist() == [[3, 0, 5, 0], [3, 2, 7, 0]]
    assert asked(entries).tolist() == [[3, NOT_ASKED, NOT_ASKED, 0], [NOT_ASKED, 2, 7, NOT_ASKED]]
    assert count_asked(entries) == 3  # the first token of each context is no target


def test_documents_are_told_apart_and_their_first_tokens_are_not_asked_for() -> None:
    end = 9
    contexts = np.array([[9, 3, 9, 9, 5], [1, 2, 3, 4, 9], [0, 9, 1 << 31, 2, 3]])
    marked = mark_documents(contexts, end)
    assert read(marked).tolist() == contexts.tolist()
    first = [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert begins(marked).astype(int).tolist() == first
    assert asked(marked).tolist() == np.where(np.array(first) == 1, NOT_ASKED, contexts).tolist()
    assert count_asked(marked) == 12 - 4


def test_an_entry_that_is_only_read_begins_no_document() -> None:
    assert begins(np.array([[-1, -(1 << 32), 7]])).tolist() == [[False, False, False]]
