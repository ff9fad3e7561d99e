"""Documents from files: the embedded novels, and local text, JSONL and Parquet, alone or in folders.

A .txt file is one document; a line of JSONL and a row of Parquet are one each. Parquet is read by pyarrow's
own reader and not by `datasets`, whose streaming reader can abort the process at exit (see `node.data.hub`).
Faults in a file are the user's to mend, so each is a `ConfigError` with file and line or row.
"""

from __future__ import annotations

import gzip
import importlib
import lzma
import os
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from netem.errors import ConfigError
from node.config.data import EMBEDDED_CORPUS, KNOWN_CORPORA
from node.data import embedded

TEXT_SUFFIXES = (".txt", ".jsonl")
PACKED_SUFFIXES = (".gz", ".xz")
PARQUET_SUFFIX = ".parquet"
_PARQUET_BATCH_ROWS = 64


class EmbeddedNovels:
    """The seven novels inside the package, checked against their digest."""

    name = EMBEDDED_CORPUS
    default_max_tokens = 0

    def __init__(self, folder: Path = embedded.FOLDER) -> None:
        self._folder = folder

    def identity(self) -> dict[str, Any]:
        return {"embedded": embedded.NOVELS, "sha256": embedded.NOVELS_SHA256}

    def documents(self) -> Generator[str, None, None]:
        yield from _jsonl_documents(embedded.checked_novels(self._folder), "text")


class LocalFiles:
    """A file, or a folder to any depth, in order of path. Raises `ConfigError` if it holds no corpus."""

    default_max_tokens = 0

    def __init__(self, corpus: str, text_field: str) -> None:
        self.name = corpus
        self._text_field = text_field
        try:
            self._files = _find(Path(os.path.expanduser(corpus)), corpus)
        except OSError as error:
            raise ConfigError(f"data.corpus = {corpus!r}: {error.strerror or error}") from None

    def identity(self) -> dict[str, Any]:
        """Sizes and modification times, not contents: a corpus may be hundreds of gigabytes."""
        listing = []
        for path in self._files:
            status = path.stat()
            listing.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
        return {"files": listing, "text_field": self._text_field}

    def documents(self) -> Generator[str, None, None]:
        for path in self._files:
            try:
                yield from _file_documents(path, self._text_field)
            except OSError as error:  # gzip.BadGzipFile too
                raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
            except (lzma.LZMAError, zlib.error, EOFError) as error:
                raise ConfigError(f"{path}: the compressed file is damaged or cut short: {error}") from None
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}: not UTF-8 text: {error.reason}; convert it to UTF-8") from None


def text_of(row: Any, text_field: str, place: str) -> str:
    """The text of one `row`, or a `ConfigError` that names its `place` and what was found instead."""
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected an object with a field {text_field!r}, found {type(row).__name__}")
    if text_field not in row:
        raise ConfigError(f"{place}: no field {text_field!r}; set data.text_field to one of {', '.join(sorted(row))}")
    text = row[text_field]
    if not isinstance(text, str):
        raise ConfigError(f"{place}: field {text_field!r} is {type(text).__name__}; expected text")
    return text


def import_or_explain(module: str, purpose: str) -> Any:
    """Import a package of the extra `data` where it is used: it is slow, and most runs need none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module} ({error}); run: pip install 'isthmus[data]'") from None


def _find(root: Path, corpus: str) -> list[Path]:
    key = f"data.corpus = {corpus!r}"
    kinds = "expected .txt, .jsonl (both also .gz or .xz) or .parquet"
    if root.is_file():
        if not _readable(root):
            raise ConfigError(f"{key}: {kinds}")
        return [root]
    if not root.is_dir():
        raise ConfigError(f"{key}: no such file or folder on this machine; known names: {', '.join(KNOWN_CORPORA)}")
    files = [path for path in root.rglob("*") if path.is_file() and _readable(path)]
    if not files:
        raise ConfigError(f"{key}: the folder has no file to read; {kinds}")
    # By path below the root and not by what the disk returns, so that two machines read in the same order.
    return sorted(files, key=lambda path: path.relative_to(root).parts)


def _readable(path: Path) -> bool:
    return not path.name.startswith(".") and (_plain_suffix(path) in TEXT_SUFFIXES or path.suffix == PARQUET_SUFFIX)


def _plain_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _file_documents(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == PARQUET_SUFFIX:
        return _parquet_documents(path, text_field)
    if _plain_suffix(path) == ".jsonl":
        return _jsonl_documents(path, text_field)
    return _text_document(path)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _text_document(path: Path) -> Iterator[str]:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    # A corpus copied through Windows gives the same tokens.
    yield text.replace("\r\n", "\n")


def _jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place}: not valid JSON: {error}") from None
            yield text_of(row, text_field, place)


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    pyarrow = import_or_explain("pyarrow", f"{path}: reading Parquet")
    parquet = import_or_explain("pyarrow.parquet", f"{path}: reading Parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                # The same sentence as for a row of JSONL that lacks the field.
                text_of(dict.fromkeys(columns), text_field, str(path))
            number = 0
            for row_group in range(file.num_row_groups):
                batches = file.iter_batches(
                    _PARQUET_BATCH_ROWS, row_groups=[row_group], columns=[text_field], use_threads=False
                )
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield text_of(row, text_field, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: not readable as Parquet: {first_line}") from None
