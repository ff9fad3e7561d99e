"""Documents, and how one is taken out of a row. Every source of the data room yields them.

Rows come from JSON, Parquet and the hub. Faults in a row are the user's to mend, so each is a `ConfigError` that
names the file and the row.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

from netem.errors import ConfigError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object", str: "text"}

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text, and the `place` to name in messages: its file and, where the file holds several, its row."""

    text: str
    place: str


Documents = Generator[Document, None, None]


def document_of(row: Any, text_field: str, place: str) -> Document | None:
    """The document in one `row`, or None where its text is null.

    Half of a surrogate pair alone is no character, and becomes U+FFFD. Raises `ConfigError`, which names `place` and
    the kind of value that was found, where the row has no such field or the field holds no text.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected an object with a field {text_field!r}, found {_kind(row)}")
    if text_field not in row:
        raise ConfigError(f"{place}: no field {text_field!r}; set data.text_field to one of {', '.join(sorted(row))}")
    text = row[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{place}: field {text_field!r} is {_kind(text)}; expected text")
    return Document(whole_characters(text), place)


def whole_characters(text: str) -> str:
    """`text` with U+FFFD in place of each lone surrogate, so that it can be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _LONE_SURROGATE.sub("\ufffd", text)
    return text


def without_nulls(documents: Iterable[Document | None], name: str) -> Documents:
    """The `documents` that are not None. The number of the others is logged with `name` when reading ends or stops."""
    skipped = 0
    try:
        for document in documents:
            if document is None:
                skipped += 1
            else:
                yield document
    finally:
        if skipped:
            log.warning("%s: rows skipped because their text is null: %d", name, skipped)


def import_or_explain(module: str, purpose: str) -> Any:
    """Import a package of the extra `data` where it is used: it is slow, and most runs need none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module} ({error}); run: pip install 'isthmus[data]'") from None


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
