"""The digest in a safetensors file, by which a file that was damaged on the disk is found. No torch here.

The format (https://github.com/huggingface/safetensors): eight bytes give the length of a JSON header, which has each
tensor's type, shape and place, and text under "__metadata__"; then come the tensors' bytes. The digest is part of that
text, and is taken over all the rest: tensors by name, and the other text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from netem.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST = "digest"
"""The digest's key in the metadata."""

_TEXT = "__metadata__"
_MAX_HEADER_BYTES = 100 << 20
_BLOCK_BYTES = 4 << 20


class Content(NamedTuple):
    """One tensor: its name, its type as safetensors calls it ("F32"), its shape, and its bytes in pieces."""

    name: str
    dtype: str
    shape: Sequence[int]
    pieces: Iterable[Buffer]


def digest_of(about: Mapping[str, str], tensors: Iterable[Content]) -> str:
    """32 hex digits of the metadata `about`, without its digest, and of the tensors, which come by rising name."""
    whole = hashlib.blake2b(digest_size=16)
    whole.update(_canonical({key: text for key, text in about.items() if key != DIGEST}))
    for tensor in tensors:
        whole.update(_canonical([tensor.name, tensor.dtype, list(tensor.shape)]))
        for piece in tensor.pieces:
            whole.update(piece)
    return whole.hexdigest()


def read_about(path: Path) -> dict[str, str]:
    """The metadata of a file, unproved. Raises `ConfigError` where the file is missing or is no safetensors file."""
    with _opened(path) as file:
        about, _, _ = _header(file, path)
        return about


def check_digest(path: Path) -> None:
    """Raise `ConfigError` where a file is missing, or is not what was written. A file that has not changed since it was
    looked at is not read again."""
    try:
        state = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if fault := _fault(path, state.st_ino, state.st_size, state.st_mtime_ns):
        raise ConfigError(f"{path}: {fault}")


@lru_cache(maxsize=256)
def _fault(path: Path, inode: int, nbytes: int, changed_ns: int) -> str:
    """What is wrong with a file, in words; "" where it is as it was written."""
    try:
        with _opened(path) as file:
            about, entries, start = _header(file, path)
            if DIGEST not in about:
                return "damaged, or not written by this version of isthmus: it holds no digest"
            found = digest_of(about, _contents(file, path, entries, start))
    except ConfigError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    said = about[DIGEST]
    return "" if found == said else f"damaged: the digest of what is in it is {found[:12]}, and was {said[:12]}"


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: not a whole safetensors file: it is a folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _header(file: IO[bytes], path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]], int]:
    """The metadata, each tensor's entry, and where the tensors' bytes begin."""
    nbytes = int.from_bytes(file.read(8), "little")
    whole = os.fstat(file.fileno()).st_size
    if nbytes > min(_MAX_HEADER_BYTES, whole - 8):
        raise ConfigError(f"{path}: not a whole safetensors file: its header is longer than the file")
    try:
        header: Any = json.loads(file.read(nbytes))
    except (ValueError, RecursionError):
        header = None
    header = header if isinstance(header, dict) else {_TEXT: None}
    about: Any = header.pop(_TEXT, {})
    texts = isinstance(about, dict) and all(isinstance(text, str) for text in about.values())
    if not texts or not all(_is_entry(entry, whole - 8 - nbytes) for entry in header.values()):
        raise ConfigError(f"{path}: not a whole safetensors file: its header is damaged, or its end is missing")
    return about, header, 8 + nbytes


def _is_entry(entry: object, room_bytes: int) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not numbers or not isinstance(entry["dtype"], str) or any(type(one) is not int for one in [*shape, *offsets]):
        return False
    start, stop = offsets
    return bool(0 <= start <= stop <= room_bytes)


def _contents(file: IO[bytes], path: Path, entries: Mapping[str, dict[str, Any]], start: int) -> Iterator[Content]:
    for name, entry in sorted(entries.items()):
        first, end = entry["data_offsets"]
        yield Content(name, entry["dtype"], entry["shape"], _pieces(file, path, start + first, end - first))


def _pieces(file: IO[bytes], path: Path, start: int, nbytes: int) -> Iterator[bytes]:
    file.seek(start)
    while nbytes:
        piece = file.read(min(_BLOCK_BYTES, nbytes))
        if not piece:
            raise ConfigError(f"{path}: not a whole safetensors file: its end is missing")
        nbytes -= len(piece)
        yield piece


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
