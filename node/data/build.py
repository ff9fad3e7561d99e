"""Tokenise a stream of documents into train.bin and heldout.bin, once, in bounded memory.

One document is in memory at a time. Whether the corpus is small (see `node.data.split`) is known only after
its hundredth document, so the first ones wait on disk. Each document, or part of one, ends with end-of-text.
`node.data.store` decides where the files go and which process writes them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np

from netem.errors import ConfigError
from node.data.documents import Document
from node.data.ids import TokenArray, token_dtype
from node.data.split import SMALL_CORPUS, is_heldout, train_length
from node.data.tokenizers import Tokenizer

TRAIN = "train.bin"
HELDOUT = "heldout.bin"
_WAITING = "waiting.bin"


class Built(NamedTuple):
    """What `build` wrote. Counts are in tokens, end-of-text included; digests are of the files' bytes."""

    train_tokens: int
    heldout_tokens: int
    documents: int
    split: Literal["documents", "tails"]
    train_digest: str
    heldout_digest: str


class _Encoded(NamedTuple):
    tokens: TokenArray
    heldout: bool


def build(documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: int, folder: Path) -> Built:
    """Write train.bin and heldout.bin into `folder` and return their figures.

    `max_tokens`: stop after so many tokens of text (end-of-text not counted), if need be within a document;
    0: read to the end. Empty documents are skipped. Raises the errors of `documents`, `OSError`, and `ConfigError` with
    the place of a document that the tokenizer refuses.
    """
    encoded = _encode(documents, tokenizer, max_tokens)
    with _TokenFile(folder / TRAIN, tokenizer) as train, _TokenFile(folder / HELDOUT, tokenizer) as heldout:
        waiting = _Waiting(folder / _WAITING, tokenizer)
        waiting.fill(encoded)
        small = len(waiting) < SMALL_CORPUS
        count = 0
        for tokens, is_held in waiting.read():
            count += 1
            if small:
                cut = train_length(len(tokens))
                train.append(tokens[:cut])
                heldout.append(tokens[cut:])
            else:
                (heldout if is_held else train).append(tokens)
        waiting.discard()
        for tokens, is_held in encoded:
            count += 1
            (heldout if is_held else train).append(tokens)
    return Built(train.count, heldout.count, count, "tails" if small else "documents", train.digest(), heldout.digest())


def _encode(documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: int) -> Iterator[_Encoded]:
    left = max_tokens
    for text, place in documents:
        if not text:
            continue
        try:
            tokens = tokenizer.encode_document(text)
        except ValueError as error:
            raise ConfigError(f"{place}: the tokenizer {tokenizer.name} cannot read this text: {error}") from None
        if max_tokens:
            tokens = tokens[:left]
            left -= len(tokens)
        yield _Encoded(tokens, is_heldout(text))
        if max_tokens and left == 0:
            return


class _Waiting:
    """The first documents, on disk until their number is known."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path = path
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._entries: list[tuple[int, bool]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def fill(self, encoded: Iterator[_Encoded]) -> None:
        with self._path.open("wb") as file:
            for tokens, heldout in encoded:
                file.write(tokens.astype(self._dtype, copy=False).tobytes())
                self._entries.append((len(tokens), heldout))
                if len(self._entries) == SMALL_CORPUS:
                    return

    def read(self) -> Iterator[_Encoded]:
        with self._path.open("rb") as file:
            for length, heldout in self._entries:
                yield _Encoded(np.fromfile(file, dtype=self._dtype, count=length), heldout)

    def discard(self) -> None:
        self._path.unlink()


class _TokenFile:
    """A file of tokens being written, with its count and digest. All of it is on disk once the block is left."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eot], dtype=self._dtype).tobytes()
        self._hash = hashlib.blake2b(digest_size=16)
        self._file = path.open("wb")
        self.count = 0

    def append(self, tokens: TokenArray) -> None:
        """Add a document, or a part of one, and end-of-text; nothing if it is empty."""
        if not len(tokens):
            return
        for block in (tokens.astype(self._dtype, copy=False).tobytes(), self._end):
            self._hash.update(block)
            self._file.write(block)
        self.count += len(tokens) + 1

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
