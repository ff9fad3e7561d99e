"""The corpus and the tokenizer's merges that ship in the package, checked; origin and rights: NOTICE.md.

`node.data.tokenizers` turns the merges into an encoding and `node.data.files` reads the novels. The digests are pinned,
so that a damaged installation is an error and never a slightly different run.
"""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

from netem.errors import ConfigError

FOLDER = Path(__file__).parent
NOVELS = "novels.jsonl.xz"
NOVELS_SHA256 = "30f5e7b5f9f1a05685b648ce2730109bbcaefd74eec9e23f17469db964e6d83b"  # of the .xz file
MERGES = "gpt2-vocab.bpe.xz"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked; tiktoken pins the same


def checked_novels(folder: Path = FOLDER) -> Path:
    """Path of the packed novels, one JSON object a line, its digest checked. Raises `ConfigError`."""
    path = folder / NOVELS
    _check(path, _read(path), NOVELS_SHA256)
    return path


def load_merges(folder: Path = FOLDER) -> str:
    """The merges of the GPT-2 tokenizer as published (`vocab.bpe`), digest checked. Raises `ConfigError`."""
    path = folder / MERGES
    try:
        unpacked = lzma.decompress(_read(path))
    except (lzma.LZMAError, EOFError) as error:
        raise ConfigError(f"{path}: not readable as xz ({error}); reinstall isthmus") from None
    _check(path, unpacked, MERGES_SHA256)
    return unpacked.decode("utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); reinstall isthmus") from None


def _check(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ConfigError(
            f"{path}: sha256 is {found[:16]}…, expected {expected[:16]}…; "
            "the file was changed or damaged: reinstall isthmus"
        )
