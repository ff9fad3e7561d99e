"""Where the documents of one pass lie, and so which tokens of which chunks attend to each other.

With `data.document_masking` a token attends to earlier tokens of its own document only. A document is one run of
tokens. So a later chunk sees at most the last document of an earlier one, and only where that goes on beyond its chunk:
the *tail* of the earlier chunk. Its rows are all that is sent of the chunk, and nothing is sent where no document goes
on. Every node works all of this out from the contexts, so none of it travels.

This is arithmetic on positions. `node.exchange.chunks` sends tails, `node.model.rectangles` attends to them.

Shapes: B contexts, C chunks of n tokens, T = C·n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Run(NamedTuple):
    """Consecutive tokens of one context; `begin` and `end` count from the start of a chunk."""

    context: int
    begin: int
    end: int


class Documents:
    """The documents of B contexts. `begins_BT` says which tokens begin one; the first token of a context always does.
    `tokens` is n."""

    def __init__(self, begins_BT: npt.NDArray[np.bool_], tokens: int) -> None:
        batch, context = begins_BT.shape
        assert context % tokens == 0
        self.tokens = tokens
        places = np.arange(context)
        begins = begins_BT | (places == 0)
        after = np.full((batch, 1), context)
        later = np.concatenate([np.where(begins, places, context)[:, 1:], after], axis=1)
        # Of the document of each token: where it begins, and the position after its last token.
        self._begin_BT = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        self._end_BT = np.minimum.accumulate(later[:, ::-1], axis=1)[:, ::-1]

    def parts(self, chunk: int) -> list[Run]:
        """The runs of one document each that a chunk is made of, in all contexts: each attends to itself."""
        first = chunk * self.tokens
        found = []
        for context, ends in enumerate(self._end_BT[:, first:]):
            begin = 0
            while begin < self.tokens:
                end = min(int(ends[begin]) - first, self.tokens)
                found.append(Run(context, begin, end))
                begin = end
        return found

    def tail_begins(self, chunk: int) -> list[int]:
        """By context, where the tail of a chunk begins; n where its last document does not go on."""
        first, last = chunk * self.tokens, (chunk + 1) * self.tokens - 1
        goes_on = self._end_BT[:, last] > last + 1
        begins = np.where(goes_on, np.maximum(self._begin_BT[:, last] - first, 0), self.tokens)
        return [int(begin) for begin in begins]

    def tails(self, chunk: int, readers: Sequence[int]) -> list[Run]:
        """The tails of a chunk, one in a context at most, that any of the chunks `readers` attends to."""
        later = [reader * self.tokens for reader in readers if reader > chunk]
        if not later:
            return []
        ends = self._end_BT[:, (chunk + 1) * self.tokens - 1]
        begins = self.tail_begins(chunk)
        return [Run(c, begin, self.tokens) for c, begin in enumerate(begins) if ends[c] > min(later)]

    def rows(self, chunk: int, readers: Sequence[int]) -> int:
        """How many rows of a chunk, in all contexts, any of the chunks `readers` attends to."""
        return sum(run.end - run.begin for run in self.tails(chunk, readers))

    def seen_by(self, chunk: int, context: int, readers: Sequence[int]) -> int:
        """How many tokens of the later chunks `readers`, one after the other, attend to a chunk's tail: the first."""
        end = int(self._end_BT[context, (chunk + 1) * self.tokens - 1])
        return sum(min(max(end - reader * self.tokens, 0), self.tokens) for reader in readers)

    def head(self, chunk: int, context: int) -> int:
        """How many tokens of a chunk belong to a document that begins before it: the first; 0 where none does."""
        first = chunk * self.tokens
        if self._begin_BT[context, first] == first:
            return 0
        return min(int(self._end_BT[context, first]) - first, self.tokens)

    def before(self, chunk: int, context: int, earlier: Sequence[int]) -> int:
        """How many tokens of the chunks `earlier`, one after the other, belong to the document at a chunk's start: the
        last."""
        begin = int(self._begin_BT[context, chunk * self.tokens])
        return sum(min(max((other + 1) * self.tokens - begin, 0), self.tokens) for other in earlier)
