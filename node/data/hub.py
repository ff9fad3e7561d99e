"""Corpora of the Hugging Face hub: FineWeb, C4 and BookCorpus, streamed in a child process.

A child process reads them (`node.data.hub_reader`), because a half-read Parquet stream of `datasets` leaves Arrow
threads that sometimes abort the interpreter at exit (code 134; apache/arrow#45214). Tried with datasets 5.2 and pyarrow
26: with the iterator closed, 6 exits of 12 aborted; with garbage collected too, 3 of 12. A child can be killed.
BookCorpus is `lucadiliello/bookcorpusopen`: the original id is a loading script, which datasets 4 and later
refuse, and its rows are single sentences, whereas long contexts want whole books (17,868 of them here).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

from netem.errors import ConfigError
from node.data.documents import Document, Documents, without_nulls

DEFAULT_MAX_TOKENS = 100_000_000
# `datasets` tries 20 times, 5 s apart, to resume a broken stream; a shorter limit would end the wait too early.
SILENCE_TIMEOUT_S = 180.0
# What the child sends: messages of bytes, each a kind and a text in UTF-8. The texts come from the internet, so the
# pipe carries bytes only: `Connection.recv` would unpickle them.
DOCUMENT, NULL, END, ERROR = b"d", b"n", b"z", b"e"


class Dataset(NamedTuple):
    """The id of a dataset of plain data files on the hub, and the name of its subset (empty: the only one)."""

    id: str
    subset: str


DATASETS = {
    "fineweb": Dataset("HuggingFaceFW/fineweb", "sample-10BT"),
    "c4": Dataset("allenai/c4", "en"),
    "bookcorpus": Dataset("lucadiliello/bookcorpusopen", ""),
}


class HubStream:
    """The training split of one of the three, in the hub's order. `name` is a key of `DATASETS`."""

    default_max_tokens = DEFAULT_MAX_TOKENS

    def __init__(self, name: str, text_field: str) -> None:
        self.name = name
        self._text_field = text_field
        self._dataset = DATASETS[name]

    def identity(self) -> dict[str, Any]:
        """Dataset and subset, but not the hub's revision: to know it would take a request."""
        return {"hub": list(self._dataset), "split": "train", "text_field": self._text_field}

    def documents(self) -> Documents:
        """The documents' texts. Raises `ConfigError` in seconds where the hub is offline or out of reach."""
        messages, child_end = Pipe(duplex=False)
        with messages:
            with child_end:
                reader = self._start(child_end.fileno())
            # The block closes the child's stdin and waits for it.
            with reader:
                try:
                    yield from without_nulls(self._received(messages), f"data.corpus = {self.name!r}")
                finally:
                    reader.kill()

    def _start(self, descriptor: int) -> subprocess.Popen[bytes]:
        module = [sys.executable, "-P", "-m", "node.data.hub_reader"]
        command = [*module, str(descriptor), self.name, *self._dataset, self._text_field]
        # The child watches its stdin, and ends with this process even if it is killed.
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[descriptor])

    def _received(self, messages: Connection) -> Iterator[Document | None]:
        place = f"data.corpus = {self.name!r}"
        number = 0
        while True:
            kind, payload = _next(messages, place)
            if kind in (DOCUMENT, NULL):
                number += 1
                yield Document(payload.decode("utf-8"), f"{place}, row {number}") if kind == DOCUMENT else None
            elif kind == ERROR:
                raise ConfigError(payload.decode("utf-8"))
            else:
                assert kind == END
                return


def _next(messages: Connection, place: str) -> tuple[bytes, bytes]:
    """Kind and payload of the child's next message, awaited for a limited time. Raises `ConfigError`."""
    if not messages.poll(SILENCE_TIMEOUT_S):
        raise ConfigError(f"{place}: nothing came from the hub for {SILENCE_TIMEOUT_S:g} s; check the network")
    try:
        message = messages.recv_bytes()
    except (EOFError, OSError):
        raise ConfigError(f"{place}: the process that reads the hub ended early; see its messages above") from None
    return message[:1], message[1:]
