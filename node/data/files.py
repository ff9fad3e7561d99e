"""Documents from files: the embedded novels, and local text, JSONL and Parquet, alone or in folders.

A .txt file is one document, or several where `data.separator` says how they are parted; a line of JSONL and a row of
Parquet are one each. Parquet is read by pyarrow's own reader and not by `datasets`, whose streaming reader can abort
the process at exit (see `node.data.hub`). Faults in a file are the user's to mend, so each is a `ConfigError` with
file and line or row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netem.errors import ConfigError
from node.config.data import EMBEDDED_CORPUS, DataConfig
from node.data import embedded
from node.data.documents import Document, Documents, document_of, import_or_explain, without_nulls
from node.data.folders import PARQUET_SUFFIX, TEXT_SUFFIX, file_kind, find
from node.data.packed import DAMAGE, open_packed
from node.data.tokenizers import END_OF_TEXT

_PARQUET_BATCH_ROWS = 64
# Whole numbers become floats, since Python refuses to read those of more than 4,300 digits, and no number is a text.
_JSON = json.JSONDecoder(parse_int=float)

log = logging.getLogger(__name__)


class EmbeddedNovels:
    """The seven novels inside the package, checked against their digest."""

    name = EMBEDDED_CORPUS
    default_max_tokens = 0

    def __init__(self, folder: Path = embedded.FOLDER) -> None:
        self._folder = folder

    def identity(self) -> dict[str, Any]:
        return {"embedded": embedded.NOVELS, "sha256": embedded.NOVELS_SHA256}

    def documents(self) -> Documents:
        yield from without_nulls(_jsonl_documents(embedded.checked_novels(self._folder), "text"), self.name)


class LocalFiles:
    """A file, or a folder to any depth, in order of path. Raises `ConfigError` if it holds no corpus."""

    default_max_tokens = 0

    def __init__(self, config: DataConfig) -> None:
        self.name = config.corpus
        self._text_field = config.text_field
        self._separator = config.separator
        try:
            self._found = find(config.corpus)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            raise ConfigError(f"data.corpus = {config.corpus!r}: {error.strerror or error}{place}") from None

    def identity(self) -> dict[str, Any]:
        """Sizes and modification times, not contents: a corpus may be hundreds of gigabytes."""
        listing = []
        for path in self._found.files:
            status = path.stat()
            listing.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
        identity = {"files": listing, "text_field": self._text_field}
        return identity | ({"separator": self._separator} if self._separator else {})

    def documents(self) -> Documents:
        """The documents' texts. What is read and what is left out of a folder is logged first."""
        for line in self._found.lines():
            log.info("%s: %s", self.name, line)
        for path in self._found.files:
            try:
                yield from without_nulls(self._read(path), str(path))
            except DAMAGE as error:
                raise ConfigError(f"{path}: the compressed file is damaged or cut short: {error}") from None
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None

    def _read(self, path: Path) -> Iterator[Document | None]:
        kind = file_kind(path)
        if kind == PARQUET_SUFFIX:
            return _parquet_documents(path, self._text_field)
        if kind == TEXT_SUFFIX:
            return _text_documents(path, self._separator)
        return _jsonl_documents(path, self._text_field)


def _text_documents(path: Path, separator: str) -> Iterator[Document]:
    with open_packed(path) as file:
        content = file.read()
    try:
        # A corpus copied through Windows gives the same tokens.
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text: {error.reason}; convert it to UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: has a zero byte, so it is binary or UTF-16; convert it to UTF-8 text")
    if not separator:
        if marks := text.count(END_OF_TEXT):
            log.warning(
                "%s: holds %r %d times, read as ordinary text; data.separator = %r would end a document at each",
                *(path, END_OF_TEXT, marks, END_OF_TEXT),
            )
        yield Document(text, str(path))
        return
    for number, part in enumerate(text.split(separator), start=1):
        yield Document(part.strip("\n"), f"{path}, document {number}")


def _jsonl_documents(path: Path, text_field: str) -> Iterator[Document | None]:
    with open_packed(path) as file:
        first = True
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            place = f"{path}:{number}"
            if first and content.lstrip().startswith(b"["):
                raise ConfigError(
                    f"{place}: the file is a JSON array; expected one object a line; "
                    f"convert it with: jq -c '.[]' {path.name} > rows.jsonl"
                )
            first = False
            yield document_of(_row(content, place), text_field, place)


def _row(line: bytes, place: str) -> Any:
    """The value that a line of JSONL holds. NaN and whole numbers of any length are read, since scripts write them."""
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start + 1}; convert the file to UTF-8"
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" at")
        reason = f"not valid JSON: {fault} at character {error.pos + 1}; expected one whole object a line"
    except RecursionError:
        reason = "not readable: the JSON is nested too deep"
    raise ConfigError(f"{place}: {reason}")


def _parquet_documents(path: Path, text_field: str) -> Iterator[Document | None]:
    pyarrow = import_or_explain("pyarrow", f"{path}: reading Parquet")
    parquet = import_or_explain("pyarrow.parquet", f"{path}: reading Parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                # The same sentence as for a row of JSONL that lacks the field.
                document_of(dict.fromkeys(columns), text_field, str(path))
            number = 0
            for row_group in range(file.num_row_groups):
                batches = file.iter_batches(
                    _PARQUET_BATCH_ROWS, row_groups=[row_group], columns=[text_field], use_threads=False
                )
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield document_of(row, text_field, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: not readable as Parquet: {first_line}") from None
