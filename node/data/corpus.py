"""`open_data`: from the `[data]` section to tokens, in one call.

This is only the joint between source, tokenizer and store; each is a module of its own, and the package's
docstring has the reading order.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.data.config import DataConfig, cache_folder
from node.data.sources import make_source
from node.data.store import TokenStore
from node.data.tokenizers import TokenArray, Tokenizer, make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: `train` and `heldout` are read-only, [tokens], unsigned, mapped from disk.

    `fingerprint`, 32 hex digits, is of the tokens and the tokenizer: equal on nodes with the same data.
    """

    train: TokenArray
    heldout: TokenArray
    tokenizer: Tokenizer
    fingerprint: str


def open_data(config: DataConfig) -> Corpus:
    """Open the corpus of `config`, tokenising it into the cache the first time.

    Raises `ConfigError` for a corpus, an extra or a cache folder that is missing or cannot be used, and
    `IsthmusError` where another process has been building the same store for too long.
    """
    tokenizer = make_tokenizer(config.tokenizer)
    source = make_source(config)
    store = TokenStore.open(source, tokenizer, cache_folder(config), max_tokens=config.max_tokens)
    return Corpus(store.train, store.heldout, tokenizer, store.fingerprint)
