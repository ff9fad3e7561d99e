"""Where documents come from: a `Source` yields them one at a time, in an order that is always the same.

`make_source` picks one for the config: the embedded novels and local files are in `node.data.files`, the
Hugging Face hub in `node.data.hub`. A source knows text, not tokens; `node.data.build` reads it.
"""

from __future__ import annotations

from typing import Any, Protocol

from node.config.data import COPIES, EMBEDDED_CORPUS, HUB_CORPORA, DataConfig
from node.data.documents import Documents
from node.data.files import EmbeddedNovels, LocalFiles
from node.data.hub import HubStream


class Source(Protocol):
    """A corpus as a stream of documents."""

    @property
    def name(self) -> str:
        """As the user wrote it, for messages."""

    @property
    def default_max_tokens(self) -> int:
        """Where reading stops if the config does not say; 0: at the end."""

    def identity(self) -> dict[str, Any]:
        """Plain values that change when the documents may have: the key of the token store."""

    def documents(self) -> Documents:
        """The documents, lazily. Close the generator if it is not exhausted. Raises `ConfigError`."""


def make_source(config: DataConfig) -> Source:
    """The source that `config` names. Raises `ConfigError` where a path holds nothing that can be read."""
    if config.corpus in (EMBEDDED_CORPUS, COPIES):
        return EmbeddedNovels()
    if config.corpus in HUB_CORPORA:
        return HubStream(config.corpus, config.text_field)
    return LocalFiles(config)
