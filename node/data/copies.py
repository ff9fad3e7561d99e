"""Novels in which passages come twice: a probe of far context that is trained on ordinary text.

Each context is a piece of the novels. In it, `PASSAGES` passages are overwritten by what stands a quarter of the
context and more before them, so that from a passage's third token on (`KNOWN`: what it takes to know the place again)
every token can be copied. Only these are asked for: their loss is that of far context and of nothing else. A model
whose chunks are no longer than an eighth of the context, and which attends only to its own chunk, can do no better than
guess from the text at hand.

Contexts are made up from (seed, number) and the corpus alone, as everywhere in this room.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from netem.errors import ConfigError
from node.config.data import COPIES_BACK
from node.data.batches import Contexts
from node.data.draws import Draws
from node.data.task import Sampler, Task

PASSAGES = 8
LEAST, MOST = 16, 11
"""A passage is a 16th to an 11th of the context."""
KNOWN = 2
"""Tokens of a passage that are read before the next ones are asked for."""
LEAST_CONTEXT = 4 * KNOWN * LEAST

_VERSION = 1
_TRAIN_TAG, _HELDOUT_TAG = 0x636F70696573, 0x68656C646F7574


@dataclass(frozen=True)
class CopiesSampler:
    """Training contexts; the interface of `node.data.task.Sampler`."""

    plain: Sampler
    seed: int

    @property
    def context(self) -> int:
        return self.plain.context

    def contexts(self, cursor: int) -> Contexts:
        found = self.plain.contexts(cursor)
        return _asking(found, [plant(row, Draws(self.seed, _TRAIN_TAG, cursor + n)) for n, row in enumerate(found)])


class Copies:
    """The probe as a task (`node.data.task.Task`) over the task of a corpus."""

    def __init__(self, corpus: Task) -> None:
        self._corpus = corpus
        self.vocab_size = corpus.vocab_size
        self.summary = f"{corpus.summary}, with {PASSAGES} copied passages in each context"
        said = f"copies {_VERSION} {corpus.fingerprint}"
        self.fingerprint = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def sampler(self, context: int, batch: int, seed: int) -> CopiesSampler:
        _check_length(context)
        return CopiesSampler(self._corpus.sampler(context, batch, seed), seed)

    def heldout_count(self, context: int) -> int:
        _check_length(context)
        return self._corpus.heldout_count(context)

    def heldout_contexts(self, context: int, first: int, count: int) -> Contexts:
        found, distances = self.heldout(context, first, count)
        return _asking(found, distances)

    def heldout(self, context: int, first: int, count: int) -> tuple[Contexts, list[Contexts]]:
        """The tokens of held-out contexts, and how far back each was copied from (`plant`), [count, context + 1]."""
        found = self._corpus.heldout_contexts(context, first, count)
        distances = [plant(row, Draws(0, _HELDOUT_TAG, first + number)) for number, row in enumerate(found)]
        return found, distances


def plant(context: Contexts, draw: Draws) -> Contexts:
    """Overwrite the passages of one context [T + 1], in place. Returns how far back each of its tokens was copied from,
    [T + 1]: 0 for those that were not, and for the first `KNOWN` of each passage."""
    distances = np.zeros_like(context)
    tokens = len(context) - 1
    back, least, most = tokens // COPIES_BACK, tokens // LEAST, tokens // MOST
    span = (tokens - back) // PASSAGES
    for passage in range(PASSAGES):
        length = least + draw.one(most + 1 - least)
        start = back + passage * span + draw.one(span + 1 - length)
        source = draw.one(start - back + 1)
        context[start : start + length] = context[source : source + length]
        distances[start + KNOWN : start + length] = start - source
    return distances


def _asking(tokens: Contexts, distances: list[Contexts]) -> Contexts:
    """Context entries that ask for the tokens that were copied."""
    return np.where(np.stack(distances) == 0, -1 - tokens, tokens)


def _check_length(context: int) -> None:
    if context < LEAST_CONTEXT:
        raise ConfigError(
            f"model.context = {context}: the probe of copies is made of passages of a {LEAST}th of the context, of "
            f"which the first {KNOWN} tokens are not asked for (in the warm start too, which shortens it); set "
            f"model.context >= {LEAST_CONTEXT}"
        )
