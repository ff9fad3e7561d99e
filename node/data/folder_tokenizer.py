"""The tokenizer of a Hugging Face folder: its tokenizer.json, as the package `tokenizers` reads it.

Documents are ordinary text: one that spells a special token does not become that token, and nothing is put before or
after a document but the end-of-text that the token store adds. End-of-text is the folder's eos_token. The name bears a
digest of all this, so that token stores, fingerprints and nodes with different tokenizers differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from netem.errors import ConfigError
from node.data.documents import whole_characters
from node.data.ids import TokenArray, checked, token_dtype

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
_USUAL_END = "<|endoftext|>"


class FolderTokenizer:
    """The tokenizer in `folder`. Raises `ConfigError` where there is none, or the package is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        text = _text(folder)
        self._tokenizer = _parsed(folder / TOKENIZER, text)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_text = _end_of_text(folder, vocabulary)
        self.eot = vocabulary[self.end_of_text]
        digest = hashlib.blake2b(f"{self.eot}\n{text}".encode(), digest_size=8).hexdigest()
        self.name = f"folder-{digest}"

    def encode_document(self, text: str) -> TokenArray:
        ids = self._tokenizer.encode(whole_characters(text), add_special_tokens=False).ids
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(checked(ids, self.vocab_size), skip_special_tokens=False))

    def files(self) -> dict[str, Any]:
        """What `transformers.AutoTokenizer` needs of the folder, by file name: JSON values, or plain text."""
        about = _json(self._folder / TOKENIZER_CONFIG) | {"eos_token": self.end_of_text}
        files: dict[str, Any] = {
            TOKENIZER: _json(self._folder / TOKENIZER),
            TOKENIZER_CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"} | about,
        }
        if special := _json(self._folder / SPECIAL_TOKENS):
            files[SPECIAL_TOKENS] = special
        if (self._folder / CHAT_TEMPLATE).is_file():
            files[CHAT_TEMPLATE] = (self._folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        return files


def _text(folder: Path) -> str:
    try:
        return (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"data.tokenizer = {str(folder)!r}: {TOKENIZER} cannot be read ({reason}); give a Hugging Face folder "
            f"that holds one"
        ) from None


def _parsed(path: Path, text: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            f"data.tokenizer = {str(path.parent)!r}: needs the package tokenizers; pip install 'isthmus[data]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 (the package raises nothing narrower)
        raise ConfigError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _end_of_text(folder: Path, vocabulary: dict[str, int]) -> str:
    """The folder's eos_token, or else the usual one where the vocabulary has it."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        token = _json(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocabulary:
            return str(token)
        if token is not None:
            raise ConfigError(f"{folder / name}: eos_token = {token!r}: is no token of {TOKENIZER}")
    if _USUAL_END in vocabulary:
        return _USUAL_END
    raise ConfigError(f"{folder}: names no end of a document; set eos_token in {TOKENIZER_CONFIG} to one of its tokens")


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return content
