"""The token store: a corpus tokenised once into a cache folder, then memory-mapped by every process.

A folder bears the digest of all that decides its content (corpus, tokenizer, limit, split rule), is built
under another name behind a lock between processes, and appears complete or not at all. `node.data.build` writes its
content, and `node.data.batches` reads batches from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from filelock import FileLock, Timeout

from netem.errors import ConfigError, IsthmusError
from node.data.build import HELDOUT, TRAIN, build
from node.data.ids import TokenArray, token_dtype
from node.data.sources import Source
from node.data.split import SPLIT_VERSION
from node.data.tokenizers import Tokenizer

META = "meta.json"
STORE_VERSION = 1
# Long enough for a hub corpus on a slow line. A process waits only while another one that lives is building.
LOCK_TIMEOUT_S = 1800.0

log = logging.getLogger(__name__)


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of meta.json, which is written last. Counts are in tokens, end-of-text included."""

    corpus: str
    tokenizer: str
    vocab_size: int
    documents: int
    split: Literal["documents", "tails"]
    train_tokens: int
    heldout_tokens: int
    fingerprint: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class TokenStore:
    """An open store: `train` and `heldout` are read-only, [tokens], unsigned, mapped from disk."""

    folder: Path
    meta: Meta
    train: TokenArray
    heldout: TokenArray

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens and the tokenizer's name; nodes with different corpora differ in it."""
        return self.meta.fingerprint

    @classmethod
    def open(
        cls,
        source: Source,
        tokenizer: Tokenizer,
        cache: Path,
        *,
        max_tokens: int = 0,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> TokenStore:
        """Open the store of `source` below `cache`, building it first where it is missing.

        Of several processes that ask at once, one builds and the others wait. `max_tokens`: see `DataConfig`.
        Raises `ConfigError` for a corpus or a cache folder that cannot be used, `IsthmusError` where the
        builder takes over `lock_timeout_s`.
        """
        limit = max_tokens or source.default_max_tokens
        identity = _identity(source, tokenizer, limit)
        folder = cache / "tokens" / _folder_name(source, tokenizer, identity)
        try:
            if not (folder / META).exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with _lock(folder.with_name(f"{folder.name}.lock"), lock_timeout_s):
                    # Another process may have finished it while this one waited.
                    if not (folder / META).exists():
                        _build_folder(source, tokenizer, limit, identity, folder)
            return _load(folder)
        except OSError as error:
            raise ConfigError(
                f"data.cache = {str(cache)!r}: {error.strerror or error} ({error.filename or folder}); "
                "name a writable folder with enough space there or in ISTHMUS_CACHE"
            ) from None


def _identity(source: Source, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    return {
        "corpus": source.identity(),
        "tokenizer": [tokenizer.name, tokenizer.vocab_size],
        "max_tokens": limit,
        "split": SPLIT_VERSION,
        "store": STORE_VERSION,
    }


def _folder_name(source: Source, tokenizer: Tokenizer, identity: dict[str, Any]) -> str:
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    # The readable part is for people who look into the cache; the key alone decides.
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.name).name).strip("-")[:40]
    return f"{readable}-{tokenizer.name}-{key}"


def _build_folder(source: Source, tokenizer: Tokenizer, limit: int, identity: dict[str, Any], folder: Path) -> None:
    """Build beside `folder`, then rename. The lock is held, so a partial folder is an abandoned one."""
    log.info("tokenising %s with %s into %s", source.name, tokenizer.name, folder)
    started_s = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    for leftover in (partial, folder):  # a `folder` without meta.json was never finished
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        # Closed here and not by the garbage collector: a half-read source may own a process (see node.data.hub).
        with contextlib.closing(source.documents()) as documents:
            built = build(documents, tokenizer, limit, partial)
        if built.documents == 0:
            raise ConfigError(f"data.corpus = {source.name!r}: has no text")
        parts = [tokenizer.name, str(tokenizer.vocab_size), built.train_digest, built.heldout_digest]
        meta = Meta(
            corpus=source.name,
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            documents=built.documents,
            split=built.split,
            train_tokens=built.train_tokens,
            heldout_tokens=built.heldout_tokens,
            fingerprint=hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest(),
            identity=identity,
        )
        with (partial / META).open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(meta), indent=2))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something failed
    elapsed_s = time.monotonic() - started_s
    log.info(
        "%s: %d documents, %d training and %d held-out tokens, %.1f s",
        source.name,
        meta.documents,
        meta.train_tokens,
        meta.heldout_tokens,
        elapsed_s,
    )


def _load(folder: Path) -> TokenStore:
    try:
        meta = msgspec.json.decode((folder / META).read_bytes(), type=Meta)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / META}: damaged ({error}); delete {folder} and start again") from None
    dtype = token_dtype(meta.vocab_size)
    return TokenStore(
        folder,
        meta,
        _map(folder / TRAIN, dtype, meta.train_tokens),
        _map(folder / HELDOUT, dtype, meta.heldout_tokens),
    )


def _map(path: Path, dtype: np.dtype[Any], count: int) -> TokenArray:
    expected_bytes = count * dtype.itemsize
    found_bytes = path.stat().st_size
    if found_bytes != expected_bytes:
        raise ConfigError(
            f"{path}: {found_bytes} bytes, expected {expected_bytes}; delete {path.parent} and start again"
        )
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


@contextlib.contextmanager
def _lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel releases it however the holder ends."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("waiting for another process to tokenise the corpus (%s)", path)
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            raise IsthmusError(
                f"{path}: another process has been tokenising this corpus for over {timeout_s:g} s; "
                "end it, or wait for it and start again"
            ) from None
    try:
        yield
    finally:
        lock.release()
