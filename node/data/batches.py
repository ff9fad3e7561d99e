"""Contexts out of a token store: for training a random one for every number, for evaluation a walk in order.

Context k of a run is a function of (seed, k) and the store alone. There is no state to save but the cursor, and
batches are the same on every node, after every restart and for every batch size. The tokens come from
`node.data.store`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from netem.errors import ConfigError
from node.data.ids import TokenArray

Contexts = npt.NDArray[np.int64]

# Second word of the Philox key, so that another use of the same seed draws other numbers.
_KEY_TAG = 0x697374686D7573  # "isthmus"


class BatchSampler:
    """Training contexts, drawn uniformly and with replacement from all places of `tokens`.

    `context`: tokens in a context, T; `batch`: contexts in a batch; `seed`: 0 to 2**64 − 1.
    Raises `ConfigError` where `tokens` is shorter than a context and its last target.
    """

    def __init__(self, tokens: TokenArray, context: int, batch: int, seed: int) -> None:
        assert context > 0, "a context has at least one token"
        assert batch > 0, "a batch has at least one context"
        _check_length(tokens, context, "training")
        self.tokens = tokens
        self.context = context
        self.batch = batch
        self.seed = seed
        self._key = np.array([seed, _KEY_TAG], dtype=np.uint64)
        self._places = len(tokens) - context

    def contexts(self, cursor: int) -> Contexts:
        """The batch that begins at context number `cursor`, [batch, context + 1].

        Columns 0 to context − 1 are inputs, columns 1 to context their targets. The next batch begins at
        `cursor + batch`.
        """
        starts = [self.start(cursor + row) for row in range(self.batch)]
        return _take(self.tokens, starts, self.context)

    def start(self, number: int) -> int:
        """Where context `number` begins in `tokens`."""
        # Raw words, because numpy never changes a bit generator's stream, while it may change how `Generator` uses it.
        # The multiplication scales the word to the places; its bias is under places / 2**64.
        word = np.random.Philox(key=self._key, counter=number).random_raw()
        return (int(word) * self._places) >> 64


def heldout_count(tokens: TokenArray, context: int) -> int:
    """How many contexts the held-out walk over `tokens` has. Raises `ConfigError` where it has none."""
    assert context > 0, "a context has at least one token"
    _check_length(tokens, context, "held-out")
    return (len(tokens) - 1) // context


def heldout_contexts(tokens: TokenArray, context: int, first: int, count: int) -> Contexts:
    """Contexts `first` to `first + count − 1` of the walk, [count, context + 1]; fewer where the walk ends.

    Each token is a target at most once: the last token of one context is the first input of the next.
    Raises `ConfigError` where `tokens` is shorter than a context and its last target.
    """
    assert first >= 0
    stop = min(first + count, heldout_count(tokens, context))
    return _take(tokens, [number * context for number in range(first, stop)], context)


def _take(tokens: TokenArray, starts: list[int], context: int) -> Contexts:
    taken = np.empty((len(starts), context + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        taken[row] = tokens[start : start + context + 1]
    return taken


def _check_length(tokens: TokenArray, context: int, part: str) -> None:
    if len(tokens) < context + 1:
        raise ConfigError(
            f"model.context = {context}: the {part} part of the corpus has {len(tokens)} tokens and a "
            f"context needs {context + 1} (its last target too); set a shorter model.context or name a larger corpus"
        )
