"""The interface between training and its data: contexts by number, held-out contexts, and which tokens count.

`node.data.corpus` is text, in which every token is asked for. `node.data.recall` is made up, and asks only for tokens
that earlier parts of the context determine. Both are pure functions of (seed, cursor), so that nodes exchange nothing
but the cursor.

A context is an array of T + 1 token ids. A token that is read but not asked for, so that its prediction does not
count in any loss, stands there as −1 − id; `read` and `asked` take the two meanings apart. Where attention stays within
a document (`data.document_masking`), the first token of a document stands there as −1 − id − `BEGINS`: it is read, it
is not asked for, since nothing of its document comes before it, and `begins` finds it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from netem.errors import ConfigError
from node.data.batches import Contexts

NOT_ASKED = -100
"""The target in place of a token whose prediction does not count (torch's default `ignore_index`)."""
BEGINS = 1 << 40
"""What is taken off the entry of a token that begins a document; ids are smaller by far."""


class Sampler(Protocol):
    """Training contexts of one length."""

    @property
    def context(self) -> int:
        """Tokens in a context, T."""

    def contexts(self, cursor: int) -> Contexts:
        """The batch that begins at context number `cursor`, [batch, T + 1]."""


class Task(Protocol):
    """A source of contexts. `fingerprint` is equal on nodes with the same data."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def summary(self) -> str:
        """Its kind and its size, for the log."""

    def sampler(self, context: int, batch: int, seed: int) -> Sampler:
        """Training contexts of `context` tokens. Raises `ConfigError` where the task has none of that length."""

    def heldout_count(self, context: int) -> int:
        """How many held-out contexts there are. Raises `ConfigError` where there is none."""

    def heldout_contexts(self, context: int, first: int, count: int) -> Contexts:
        """Held-out contexts `first` to `first + count − 1`, [count, context + 1]; fewer where they end."""


def heldout_batches(task: Task, context: int, batch: int) -> int:
    """How many full batches the held-out contexts make. Raises `ConfigError` where they do not fill one."""
    contexts = task.heldout_count(context)
    if contexts < batch:
        raise ConfigError(
            f"train.batch = {batch}: the held-out part of the corpus has only {contexts} contexts of "
            f"model.context = {context} tokens; set a smaller batch or name a larger corpus"
        )
    return contexts // batch


def check_room(task: Task, context: int, batch: int) -> None:
    """Raise `ConfigError` where the task has no training context of this length, or no full batch of held-out ones."""
    task.sampler(context, batch, seed=0)
    heldout_batches(task, context, batch)


def read(entries: Contexts) -> Contexts:
    """The token ids of context entries, asked for or not."""
    return np.where(entries < 0, (-1 - entries) % BEGINS, entries)


def asked(entries: Contexts) -> Contexts:
    """The token ids that are asked for, and `NOT_ASKED` in place of the others."""
    return np.where(entries < 0, NOT_ASKED, entries)


def count_asked(contexts: Contexts) -> int:
    """How many targets of the contexts count: the first token of each is no target."""
    return int((contexts[:, 1:] >= 0).sum())


def begins(entries: Contexts) -> npt.NDArray[np.bool_]:
    """Which entries begin a document, as `mark_documents` has found."""
    return entries < -BEGINS


def mark_documents(contexts: Contexts, end_of_text: int) -> Contexts:
    """Contexts of plain ids whose documents are told apart: one begins after each end-of-text."""
    follows = contexts[:, :-1] == end_of_text
    return np.concatenate([contexts[:, :1], np.where(follows, -1 - contexts[:, 1:] - BEGINS, contexts[:, 1:])], axis=1)
