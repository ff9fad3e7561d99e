"""`open_data`: from the `[data]` section to tokens, in one call.

This module only joins source, tokenizer and store. Each is a module of its own, and the package's docstring has the
reading order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from node.config.data import COPIES, RECALL, DataConfig, cache_folder
from node.data.batches import BatchSampler, Contexts, heldout_contexts, heldout_count
from node.data.copies import Copies
from node.data.ids import TokenArray
from node.data.recall import Recall
from node.data.sources import make_source
from node.data.store import TokenStore
from node.data.task import Sampler, Task, mark_documents
from node.data.tokenizers import Tokenizer, make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, as a `Task`: `train` and `heldout` are read-only, [tokens], unsigned, mapped from disk.

    `fingerprint`, 32 hex digits, is a digest of the tokens and the tokenizer: equal on nodes with the same data.
    `marks_documents` says whether contexts tell where documents begin (`node.data.task`).
    """

    train: TokenArray
    heldout: TokenArray
    tokenizer: Tokenizer
    fingerprint: str
    marks_documents: bool = False

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def summary(self) -> str:
        counts = f"{len(self.train)} training and {len(self.heldout)} held-out tokens"
        if not self.marks_documents:
            return counts
        ends = max(1, int(np.count_nonzero(self.train == self.tokenizer.eot)))
        return f"{counts}, {len(self.train) / ends:.0f} in a training document (data.document_tokens)"

    def sampler(self, context: int, batch: int, seed: int) -> Sampler:
        sampler = BatchSampler(self.train, context, batch, seed)
        return _MarkedSampler(sampler, self.tokenizer.eot) if self.marks_documents else sampler

    def heldout_count(self, context: int) -> int:
        return heldout_count(self.heldout, context)

    def heldout_contexts(self, context: int, first: int, count: int) -> Contexts:
        contexts = heldout_contexts(self.heldout, context, first, count)
        return mark_documents(contexts, self.tokenizer.eot) if self.marks_documents else contexts


@dataclass(frozen=True)
class _MarkedSampler:
    """Contexts that tell where documents begin."""

    sampler: BatchSampler
    end_of_text: int

    @property
    def context(self) -> int:
        return self.sampler.context

    def contexts(self, cursor: int) -> Contexts:
        return mark_documents(self.sampler.contexts(cursor), self.end_of_text)


def open_data(config: DataConfig) -> Task:
    """Open the task of `config`; a corpus is tokenised into the cache the first time.

    Raises `ConfigError` for a corpus, an extra or a cache folder that is missing or cannot be used, and
    `IsthmusError` where another process has been building the same store for too long.
    """
    if config.corpus == RECALL:
        return Recall()
    tokenizer = make_tokenizer(config.tokenizer)
    source = make_source(config)
    store = TokenStore.open(source, tokenizer, cache_folder(config), max_tokens=config.max_tokens)
    corpus = Corpus(store.train, store.heldout, tokenizer, store.fingerprint, config.document_masking)
    return Copies(corpus) if config.corpus == COPIES else corpus
