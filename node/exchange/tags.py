"""The names of tensors on the wire: short msgpack arrays that netem carries without looking inside.

A tag is decoded with the `msgpack` package, then validated into a typed struct, before anything is allocated for
what follows it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgpack
import msgspec
from msgspec import Meta

from netem.errors import ProtocolError
from node.config import FormatName
from node.exchange.transfer_tags import TransferTag

Index = Annotated[int, Meta(ge=0, le=1 << 40)]


class Piece(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of a payload that readers pass on (`node.exchange.routes`)."""

    number: Index
    of: Annotated[int, Meta(ge=1, le=1 << 16)]
    """In how many pieces the payload goes."""
    checksum: Annotated[int, Meta(ge=0, lt=1 << 32)]
    """CRC-32 of the piece's bytes as its owner sent them."""
    trains: bool
    """Whether the pass has a backward, which a node that passes the piece on may not know yet."""


class ChunkTag(msgspec.Struct, frozen=True, array_like=True, tag="chunk", forbid_unknown_fields=True):
    """A chunk's payload on its way to a reader ("kv"), or that payload's gradient on its way back ("grad").

    After a pass without gradients a reader says "done" instead, with nothing behind it. "theta" are rotation parameters
    computed from this chunk on their way to the owner of the next, and "dtheta" their gradient.
    """

    kind: Literal["kv", "grad", "done", "theta", "dtheta"]
    pass_no: Index
    layer: Index
    chunk: Index
    tokens: Index
    compressed: bool
    format: FormatName
    shapes: tuple[tuple[Index, ...], ...]
    """Those of the whole payload."""
    piece: Piece | None = None
    """None where the message is the whole payload, straight from its owner."""


class RingTag(msgspec.Struct, frozen=True, array_like=True, tag="ring", forbid_unknown_fields=True):
    """A shard of a vector that an averaging round sends round the ring."""

    round_id: Index
    hop: Index
    bucket: Index


Tag = ChunkTag | RingTag
AnyTag = Tag | TransferTag

msgspec.msgpack.Decoder(AnyTag)  # msgspec looks into the types now, and not first in several threads at once


def encode_tag(tag: AnyTag) -> bytes:
    """The tag's bytes."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(tag))
    return packed


def decode_tag(data: bytes, peer: str) -> AnyTag:
    """Validate a tag that came from `peer`. Raises `ProtocolError`."""
    try:
        tree = msgpack.unpackb(data, use_list=True, max_str_len=64, max_array_len=64, max_map_len=0)
        named: AnyTag = msgspec.convert(tree, AnyTag, strict=True)
    except (ValueError, msgpack.UnpackException, msgspec.ValidationError) as error:
        raise ProtocolError(f"a tensor came with a malformed tag: {error}", peer=peer) from None
    return named
