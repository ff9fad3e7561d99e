"""Corpora of the Hugging Face hub: FineWeb, C4 and BookCorpus, streamed in a child process.

A child (`node.data.hub_reader`), because a half-read Parquet stream of `datasets` leaves Arrow threads that
now and then abort the interpreter at exit (code 134; apache/arrow#45214). Tried with datasets 5.2, pyarrow 26:
with the iterator closed, 6 exits of 12 aborted; with garbage collected too, 3 of 12. A child can just be ended.
BookCorpus is `lucadiliello/bookcorpusopen`: the original id is a loading script, which datasets 4 and later
refuse, and its rows are single sentences, whereas long contexts want whole books (17,868 of them here).
"""

from __future__ import annotations

import os
import selectors
import struct
import subprocess
import sys
from collections.abc import Generator
from typing import Any, NamedTuple

from netem.errors import ConfigError

DEFAULT_MAX_TOKENS = 100_000_000
# `datasets` tries 20 times, 5 s apart, to take up a broken stream; only then is the silence ours to end.
SILENCE_TIMEOUT_S = 180.0
_READ_BYTES = 1 << 18
# What the child writes: kind and bytes of payload, then the payload in UTF-8.
HEADER = struct.Struct("<cQ")
DOCUMENT, END, ERROR = b"d", b"z", b"e"


class Dataset(NamedTuple):
    """Where on the hub: a dataset of plain data files, and which subset of it."""

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
        """Id and subset; not the hub's revision, which only a request could tell."""
        return {"hub": list(self._dataset), "split": "train", "text_field": self._text_field}

    def documents(self) -> Generator[str, None, None]:
        """The documents' texts. Raises `ConfigError` in seconds where the hub is offline or out of reach."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "node.data.hub_reader",
            self.name,
            *self._dataset,
            self._text_field,
        ]
        # The child watches its stdin, and ends with us even if we are killed.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            try:
                yield from self._received(reader)
            finally:
                reader.kill()

    def _received(self, reader: subprocess.Popen[bytes]) -> Generator[str, None, None]:
        assert reader.stdout is not None
        frames = _Frames(reader.stdout.fileno(), f"data.corpus = {self.name!r}")
        while True:
            kind, payload = frames.next()
            if kind == DOCUMENT:
                yield payload.decode("utf-8")
            elif kind == ERROR:
                raise ConfigError(payload.decode("utf-8"))
            else:
                assert kind == END
                return


class _Frames:
    """Frames of the child's pipe, as `node.data.hub_reader` writes them, each awaited for a limited time."""

    def __init__(self, descriptor: int, place: str) -> None:
        self._descriptor = descriptor
        self._place = place
        self._buffer = bytearray()

    def next(self) -> tuple[bytes, bytes]:
        kind, length = HEADER.unpack(self._take(HEADER.size))
        return kind, self._take(length)

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _fill(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            if not selector.select(SILENCE_TIMEOUT_S):
                raise ConfigError(
                    f"{self._place}: nothing came from the hub for {SILENCE_TIMEOUT_S:g} s; check the network"
                )
        received = os.read(self._descriptor, _READ_BYTES)
        if not received:
            raise ConfigError(f"{self._place}: the process that reads the hub ended early; see its messages above")
        self._buffer += received
