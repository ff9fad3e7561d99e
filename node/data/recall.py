"""A probe whose answers all lie far back in the context: loss is low only if K and V cross well.

A token either plants a pair (a key with a value), or is a key that asks for its value, or is a value. One lookup in
the context answers each question, so that small models learn the task in minutes. If a pair were two tokens, a model
would first have to learn to join them, which took longer than a study has (the plateau before induction heads).
Each context of T tokens is made up from (seed, number), in parts of T / 16, with filler between:
  first part    facts: planted pairs, no key twice;
  middle        more pairs, planted over less than two parts; then a part of filler; then a sequence of
                questions and answers, repeated with a random period of more than one part and at most two;
  last          the facts' keys in another order, each followed by its value.
The values are asked for. Each stands more than one part behind every token that determines it: a model whose chunks
are no longer than a part and attend only to themselves can only guess uniformly, with a loss of ln `VALUES`. Distance
and period differ from context to context, so that counting back finds nothing. Tokens that are not asked for are not
trained on: they are noise, and without their gradients a model learns to recall in a fraction of the steps.
"""

from __future__ import annotations

import hashlib

import numpy as np

from netem.errors import ConfigError
from node.config.data import RECALL_PARTS as PARTS
from node.data.batches import Contexts
from node.data.draws import Draws

VALUES = 8
FACT_KEYS = 8
KEYS = 8
"""Keys of the middle parts."""
HELDOUT_CONTEXTS = 1 << 12

_VERSION = 2
# Ids: the values, then all keys, those of facts first, then a planted pair for every key and value, then filler.
_FIRST_KEY = VALUES
_FIRST_PAIR = _FIRST_KEY + FACT_KEYS + KEYS
_FILLER = _FIRST_PAIR + (FACT_KEYS + KEYS) * VALUES
_FILLED = np.array([-1 - _FILLER])
# Second words of the Philox key, so that a corpus, the probe and its held-out contexts all draw different numbers.
_TRAIN_TAG, _HELDOUT_TAG = 0x726563616C6C, 0x68656C646F7574


class RecallSampler:
    """Training contexts of the probe; the interface of `node.data.task.Sampler`."""

    def __init__(self, context: int, batch: int, seed: int) -> None:
        _check_length(context)
        self.context = context
        self._batch = batch
        self._seed = seed

    def contexts(self, cursor: int) -> Contexts:
        numbers = range(cursor, cursor + self._batch)
        return np.stack([make_context(self.context, self._seed, _TRAIN_TAG, number) for number in numbers])


class Recall:
    """The probe as a task (`node.data.task.Task`). Its held-out contexts are another stream, equal for all seeds."""

    vocab_size = _FILLER + 1
    fingerprint = hashlib.blake2b(f"recall {_VERSION} {vocab_size}".encode(), digest_size=16).hexdigest()
    summary = f"recall probe, {FACT_KEYS + KEYS} keys and {VALUES} values, made up from the seed"

    def sampler(self, context: int, batch: int, seed: int) -> RecallSampler:
        return RecallSampler(context, batch, seed)

    def heldout_count(self, context: int) -> int:
        _check_length(context)
        return HELDOUT_CONTEXTS

    def heldout_contexts(self, context: int, first: int, count: int) -> Contexts:
        stop = min(first + count, self.heldout_count(context))
        return np.stack([make_context(context, 0, _HELDOUT_TAG, number) for number in range(first, stop)])


def make_context(context: int, seed: int, tag: int, number: int) -> Contexts:
    """Context `number` of a stream, [context + 1]; entries that are not asked for are −1 − id (`node.data.task`)."""
    part = context // PARTS
    draw = Draws(seed, tag, number)
    keys = draw.order(FACT_KEYS)[: part // 2]
    values = draw.below(VALUES, len(keys))
    order = draw.order(len(keys))
    planted, answers = _planted(draw, keys, values, part), _answers(keys[order], values[order]).reshape(-1)
    return np.concatenate([planted, _repeating(draw, context + 1 - part - len(answers), part), answers])


def _repeating(draw: Draws, length: int, part: int) -> Contexts:
    """Planted pairs, at least a part of filler, then questions and answers repeated with a random period."""
    spread, period = (int(drawn) for drawn in draw.below(part, 2))
    keys = FACT_KEYS + draw.order(KEYS)[: (part + 1) // 2]
    values = draw.below(VALUES, len(keys))
    spare = part + 1 + period - 2 * len(keys)
    answers = _answers(keys, values)
    scattered = [answers[thing] if thing < len(keys) else _FILLED for thing in draw.order(len(keys) + spare)]
    planted = _planted(draw, keys, values, len(keys) + spread)
    repeats = np.resize(np.concatenate(scattered), length - len(planted) - part)
    return np.concatenate([planted, np.tile(_FILLED, part), repeats])


def _planted(draw: Draws, keys: Contexts, values: Contexts, length: int) -> Contexts:
    """[length], one token for each pair, in random places among filler."""
    entries = np.full(length, -1 - _FILLER)
    entries[draw.order(length)[: len(keys)]] = -1 - (_FIRST_PAIR + keys * VALUES + values)
    return entries


def _answers(keys: Contexts, values: Contexts) -> Contexts:
    """A question and its answer for each pair, [pairs, 2]."""
    return np.stack([-1 - (_FIRST_KEY + keys), values], 1)


def _check_length(context: int) -> None:
    if context < 4 * PARTS:
        raise ConfigError(
            f"model.context = {context}: the recall probe is made of {PARTS} parts of at least 4 tokens "
            f"(in the warm start too, which shortens it); set model.context >= {4 * PARTS}"
        )
