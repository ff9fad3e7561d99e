"""Tokenizers: GPT-2's, whole or its first merges only, built offline from the embedded file, and plain bytes.

A Hugging Face folder's is in `node.data.folder_tokenizer`. All turn whole documents into ids and back, and know one
special token, end-of-text. Only the token store adds it (`node.data.build`): text that happens to spell `<|endoftext|>`
is ordinary text. Half of a surrogate pair alone is read as U+FFFD.
The merges are read by `node.data.embedded`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from netem.config import user_path
from netem.errors import ConfigError
from node.config.data import TOKENIZERS, is_folder
from node.data.documents import whole_characters
from node.data.embedded import load_merges
from node.data.folder_tokenizer import FolderTokenizer
from node.data.ids import TokenArray, checked, token_dtype

END_OF_TEXT = "<|endoftext|>"
_PIECE_CHARS = 1 << 20
# GPT-2's pattern never joins a visible character to the space after it, so a cut there changes no token.
_SAFE_CUT = re.compile(r"(?<=[A-Za-z0-9.,;:!?])(?=[ \n])")
# White space as the pattern of GPT-2 means it (Unicode's White_Space; Python's own \s has four characters more).
_BLANKS = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The regex engine gives up at a million blanks that are followed by something else.
_LONGEST_RUN = 1 << 12
# Equivalent to the pattern of the original release, and faster (tiktoken_ext.openai_public, r50k).
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included: every id is below it."""

    @property
    def eot(self) -> int:
        """The id of end-of-text."""

    def encode_document(self, text: str) -> TokenArray:
        """Ids of `text`, [tokens], without end-of-text; unsigned, see `token_dtype`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD. Raises `ValueError` for an id that does not exist."""


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, one of `TOKENIZERS`, or that of the folder at this path. Raises `ConfigError` for
    any other name, and for a folder without a tokenizer."""
    if name == "bytes":
        return ByteTokenizer()
    if name in TOKENIZERS:
        return _gpt2(name)
    if is_folder(name):
        return FolderTokenizer(user_path(name, "data.tokenizer"))
    raise ConfigError(f"data.tokenizer = {name!r}: expected {', '.join(TOKENIZERS)}, or the path of a folder")


class Gpt2Tokenizer:
    """OpenAI's GPT-2 byte-level BPE, from the text of its `vocab.bpe`; `name` may end in a size of the vocabulary."""

    def __init__(self, name: str, merges: str) -> None:
        self.name = name
        _, _, size = name.partition("-")
        ranks = _ranks(merges)
        if size:  # the most frequent merges come first, so that the first of them alone make a tokenizer too
            ranks = dict(islice(ranks.items(), int(size) - 1))
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name, pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot}
        )

    def encode_document(self, text: str) -> TokenArray:
        # In pieces: a whole book at once would cost several times its size in temporary memory.
        pieces = [self._encode(part) for piece in _pieces(whole_characters(text)) for part in _short_runs(piece)]
        return np.concatenate(pieces).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(checked(ids, self.vocab_size))

    def _encode(self, text: str) -> npt.NDArray[np.uint32]:
        # No special token is disallowed and none is allowed, so all text is ordinary.
        return self._encoding.encode_to_numpy(text, disallowed_special=())


class ByteTokenizer:
    """The 256 values of a byte, and end-of-text. Text has about five times as many tokens as with GPT-2's."""

    name = "bytes"
    vocab_size = 257
    eot = 256

    def encode_document(self, text: str) -> TokenArray:
        content = whole_characters(text).encode("utf-8")
        return np.frombuffer(content, dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        marker = END_OF_TEXT.encode()
        content = b"".join(marker if i == self.eot else bytes([i]) for i in checked(ids, self.vocab_size))
        return content.decode("utf-8", "replace")


@functools.cache
def _gpt2(name: str) -> Gpt2Tokenizer:
    return Gpt2Tokenizer(name, load_merges())


def _ranks(merges: str) -> dict[bytes, int]:
    """Bytes of every token by id: the 256 bytes in GPT-2's order, then the merges in theirs."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # vocab.bpe writes a printable byte as that character, and the n-th other byte as character 256 + n.
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*printable, *others])}
    for line in merges.splitlines()[1:]:  # the first line is the version
        left, right = line.split(" ")
        ranks[bytes(byte_of[char] for char in left + right)] = len(ranks)
    return ranks


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _short_runs(text: str) -> Iterator[str]:
    """Parts of `text` that give the same tokens one by one, such that no match has to take back a long run of blanks.

    In a run of blanks before a visible character, the pattern takes all but the last as one match. So a long run is
    cut where that match begins and ends: a run at the end of a text is one match, found without going back.
    """
    start = 0
    for run in _long_runs(_LONGEST_RUN).finditer(text):
        if run.end() < len(text):
            yield text[start : run.start()]
            yield text[run.start() : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


@functools.cache
def _long_runs(shortest: int) -> re.Pattern[str]:
    # A match may begin only where a run begins: otherwise the search in runs that are too short takes quadratic time.
    return re.compile(f"(?<![{_BLANKS}])[{_BLANKS}]{{{shortest},}}+")
