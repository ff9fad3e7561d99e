"""An inbox in a world of three, what may be sent to it, and a thread that waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from coordinator.assignment import Assignment
from helpers.worlds import tiny_config
from netem.errors import IsthmusError
from node.exchange.inbox import Inbox, Members
from node.exchange.passes import PassKey, PassSpec
from node.exchange.tags import ChunkTag, Tag, encode_tag
from node.train.from_config import payload_format

WORLD = Assignment([[0], [1, 3], [2]])
NAMES = ("ann", "bob", "cyd")
ME = 1  # bob: owes chunk 1 to cyd, reads 0 from ann and 2 from cyd
FORMAT = payload_format(tiny_config())
SPEC = PassSpec(8, True)
KEY = PassKey(5, SPEC, True)
RING_CAP_BYTES = 1000
FULL = 5


def make_inbox(pass_no: int = FULL) -> Inbox:
    inbox = Inbox(FORMAT, RING_CAP_BYTES)
    inbox.enter(Members(1, WORLD, ME, NAMES))
    inbox.begin(pass_no)
    return inbox


def tag(kind: str = "kv", chunk: int = 0, **changes: Any) -> ChunkTag:
    fields = {"pass_no": FULL, "layer": 0, "tokens": 8, "compressed": True, "format": "float32"} | changes
    spec = PassSpec(fields["tokens"], fields["compressed"])
    shapes = () if kind == "done" else tuple(t.shape for t in FORMAT.tensors(fields["layer"], spec))
    return ChunkTag(kind=kind, chunk=chunk, **({"shapes": shapes} | fields))  # type: ignore[arg-type]


def size(named: ChunkTag) -> int:
    return 0 if named.kind == "done" else FORMAT.chunk_bytes(named.layer, PassSpec(named.tokens, named.compressed))


def admit(inbox: Inbox, peer: str, named: Tag, total_bytes: int | None = None) -> memoryview | None:
    wanted = total_bytes if total_bytes is not None else size(named)  # type: ignore[arg-type]
    return inbox.admit(peer, 1, encode_tag(named), wanted)


def arrive(inbox: Inbox, peer: str, named: Tag, total_bytes: int | None = None) -> None:
    room = admit(inbox, peer, named, total_bytes)
    assert room is not None
    inbox.deliver(peer, 1, encode_tag(named), room)


def waiting(wait: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """`wait` on a thread of its own, and what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            wait()
        except IsthmusError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


class Talk:
    """A conversation that only remembers."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.failures: list[IsthmusError] = []
        self.suspected: list[tuple[str, str]] = []
        self.abort: Callable[[str], None] = lambda _: None

    def on_message(self, body: memoryview) -> None:
        self.heard.append(bytes(body))

    def on_failure(self, error: IsthmusError) -> None:
        self.failures.append(error)

    def suspect(self, peer: str, reason: str) -> None:
        self.suspected.append((peer, reason))

    def on_abort(self, callback: Callable[[str], None]) -> None:
        self.abort = callback

    def on_generation(self, callback: Callable[[int], None]) -> None:
        self.announce = callback
