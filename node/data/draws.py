"""Random numbers for contexts that are made up, from raw words only, because numpy never changes a bit generator's
stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Draws:
    """Random numbers for one context, from its seed, the stream's tag and its number."""

    def __init__(self, seed: int, tag: int, number: int) -> None:
        # The number is the counter's second word: one context may take many of the first.
        self._bits = np.random.Philox(key=np.array([seed, tag], np.uint64), counter=number << 64)

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """`count` numbers from 0 to bound − 1. The remainder's bias is under bound / 2**64."""
        return (self._words(count) % np.uint64(bound)).astype(np.int64)

    def one(self, bound: int) -> int:
        """A number from 0 to bound − 1."""
        return int(self.below(bound, 1)[0])

    def order(self, count: int) -> npt.NDArray[np.int64]:
        """A permutation of `count` things."""
        return np.argsort(self._words(count), kind="stable").astype(np.int64)

    def _words(self, count: int) -> npt.NDArray[Any]:
        return np.asarray(self._bits.random_raw(count))
