"""`open_data`: from the `[data]` section to tokens, in one call.

This module only joins source, tokenizer and store. Each is a module of its own, and the package's docstring has the
reading order.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.config.data import COPIES, RECALL, DataConfig, cache_folder
from node.data.batches import BatchSampler, Contexts, heldout_contexts, heldout_count
from node.data.copies import Copies
from node.data.ids import TokenArray
from node.data.recall import Recall
from node.data.sources import make_source
from node.data.store import TokenStore
from node.data.task import Task
from node.data.tokenizers import Tokenizer, make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, as a `Task`: `train` and `heldout` are read-only, [tokens], unsigned, mapped from disk.

    `fingerprint`, 32 hex digits, is a digest of the tokens and the tokenizer: equal on nodes with the same data.
    """

    train: TokenArray
    heldout: TokenArray
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def summary(self) -> str:
        return f"{len(self.train)} training and {len(self.heldout)} held-out tokens"

    def sampler(self, context: int, batch: int, seed: int) -> BatchSampler:
        return BatchSampler(self.train, context, batch, seed)

    def heldout_count(self, context: int) -> int:
        return heldout_count(self.heldout, context)

    def heldout_contexts(self, context: int, first: int, count: int) -> Contexts:
        return heldout_contexts(self.heldout, context, first, count)


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
    corpus = Corpus(store.train, store.heldout, tokenizer, store.fingerprint)
    return Copies(corpus) if config.corpus == COPIES else corpus
