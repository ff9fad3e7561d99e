"""The messages about files: tags of netem messages. The payload of a `Piece` is its bytes; all others have none.

A side that has a file makes an `Offer`. The other one asks for its pieces (`Want`), or says that it has it, or will
never take it (`Taken`). A node begins with an offer when it has written its part of a checkpoint, and with a `Fetch`
when it needs one.
"""

from __future__ import annotations

from typing import Annotated

import msgpack
import msgspec
from msgspec import Meta

from coordinator.messages import decode
from netem.errors import ProtocolError

PIECE_BYTES = 48 << 10
"""One piece and its headers are a frame that the coordinator takes (`netem.limits.URGENT_SEGMENT_BYTES`)."""
MOST_FILE_BYTES = 1 << 42
MOST_TAG_BYTES = 256

FileName = Annotated[str, Meta(pattern=r"^(model|node-[0-9]{1,4}(\.[0-9]{1,4})?)\.safetensors$")]
Step = Annotated[int, Meta(ge=0, le=10**12)]
Offset = Annotated[int, Meta(ge=0, lt=MOST_FILE_BYTES)]


class About(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The file `name` of the checkpoint after `step` steps."""

    step: Step
    name: FileName

    @property
    def key(self) -> tuple[int, str]:
        """Step and name."""
        return self.step, self.name


class Offer(About, frozen=True, array_like=True, tag="file offer"):
    """The sender has the file. `head` is a digest of its beginning, in which a digest of all of it stands."""

    total_bytes: Annotated[int, Meta(ge=1, le=MOST_FILE_BYTES)]
    head: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]


class Want(About, frozen=True, array_like=True, tag="file want"):
    """The sender asks for the piece that begins at `offset`."""

    offset: Offset


class Piece(About, frozen=True, array_like=True, tag="file piece"):
    """The piece that begins at `offset` is the message's payload."""

    offset: Offset


class Taken(About, frozen=True, array_like=True, tag="file taken"):
    """The sender has the whole file, or for `reason` neither has it nor takes it."""

    reason: Annotated[str, Meta(max_length=100)] = ""


class Fetch(About, frozen=True, array_like=True, tag="file fetch"):
    """The sender asks for an offer of the file."""


FileMessage = Offer | Want | Piece | Taken | Fetch


def file_tag(message: FileMessage) -> bytes:
    """The message as a tag."""
    tag: bytes = msgpack.packb(msgspec.to_builtins(message))
    return tag


def read_file_tag(tag: bytes, total_bytes: int, peer: str) -> FileMessage:
    """The message of a tag whose payload has `total_bytes`. Raises `ProtocolError`, before anything is allocated."""
    message: FileMessage = decode(tag, FileMessage, peer)
    most_bytes = PIECE_BYTES if isinstance(message, Piece) else 0
    if total_bytes > most_bytes or (isinstance(message, Piece) and not total_bytes):
        raise ProtocolError(f"a {type(message).__name__} of a file with {total_bytes} bytes", peer=peer)
    return message
