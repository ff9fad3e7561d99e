"""The segment header: MessagePack on the wire, a typed struct in the program.

A frame is two ZeroMQ parts: this header with a stamp behind it, and the raw payload of one segment (empty for an
acknowledgement). The stamp is added when the frame is written: the time at which the frame is due to arrive, by the
sender's clock. Decoding trusts nothing: sizes are capped before parsing, the struct checks types and ranges, and an
invalid header raises `ProtocolError` before anything is allocated for it. `netem.link` gives the meaning of sequence,
ack and incarnation.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import Annotated, Final

import msgpack
import msgspec

from netem.errors import ProtocolError
from netem.limits import MAX_SEGMENT_BYTES

VERSION: Final = 2
_OVERHEAD_BYTES: Final = 256  # every field but the tag, at its largest

_STAMP: Final = struct.Struct(">Q")  # microseconds
STAMP_BYTES: Final = _STAMP.size

Whole = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Kind(IntEnum):
    DATA = 0
    ACK = 1


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """All fields of a segment. `offset` and `total_bytes` are bytes of the message's payload."""

    version: Whole
    run_id: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Kind
    generation: Whole
    incarnation: Whole
    """The sender's life; a restarted process has a higher number."""
    heard: Whole
    """The receiver's life that the sender has heard of, and that `ack` refers to; 0 if none yet."""
    sequence: Whole
    """Number of this segment on the link; in an acknowledgement, the number of the next segment."""
    ack: Whole
    """Every segment below this number has arrived."""
    message: Whole = 0
    offset: Whole = 0
    total_bytes: Whole = 0
    checksum: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    tag: bytes = b""
    """Bytes of the upper floor, in the first segment of a message only; netem does not read them."""


def encode(header: Header) -> bytes:
    """The header's wire form."""
    return encode_fields(*msgspec.structs.astuple(header))


def encode_fields(*fields: object) -> bytes:
    """Like `encode`, from the fields in their order. The hot path spares the struct."""
    packed: bytes = msgpack.packb(fields)
    return packed


def stamped(header: bytes, due_s: float) -> bytes:
    """The header part of a frame that is due to arrive at `due_s` of the sender's clock."""
    return header + _STAMP.pack(max(0, round(due_s * 1e6)))


def unstamped(part: bytes) -> tuple[bytes, float]:
    """The header and the stamp in seconds.

    Raises `ProtocolError` if the part is too short for both, or if its header is of another version, which may have no
    stamp. (In MessagePack the version follows the one byte that begins a short array.)
    """
    if part[:1] and 0x90 <= part[0] <= 0x9F and part[1:2] != bytes([VERSION]):
        raise ProtocolError(f"a frame that is not of version {VERSION}; do both sides run the same release?")
    if len(part) <= STAMP_BYTES:
        raise ProtocolError(f"a header of {len(part)} bytes, too short for its stamp")
    return part[:-STAMP_BYTES], _STAMP.unpack(part[-STAMP_BYTES:])[0] / 1e6


def decode(data: bytes | memoryview, *, max_tag_bytes: int) -> Header:
    """Parse and validate a header. Raises `ProtocolError`, to which the caller adds the peer's name."""
    if len(data) > max_tag_bytes + _OVERHEAD_BYTES:
        raise ProtocolError(f"a header of {len(data)} bytes, at most {max_tag_bytes + _OVERHEAD_BYTES} are allowed")
    try:
        tree = msgpack.unpackb(
            data, max_str_len=256, max_bin_len=max_tag_bytes, max_array_len=16, max_map_len=0, max_ext_len=0
        )
        if not isinstance(tree, list) or not tree or tree[0] != VERSION:
            raise ProtocolError(f"a frame that is not of version {VERSION}")
        header = msgspec.convert(tree, Header)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a malformed header: {error}") from None
    _check(header)
    return header


def _check(header: Header) -> None:
    if header.tag and header.offset:
        raise ProtocolError("a tag on a later segment of a message")
    if header.offset > header.total_bytes:
        raise ProtocolError(f"a segment at byte {header.offset} of a message of {header.total_bytes} bytes")
    if header.kind is Kind.ACK and (header.total_bytes or header.tag):
        raise ProtocolError("an acknowledgement with a payload")
    if header.incarnation == 0:
        raise ProtocolError("a sender without an incarnation")


def check_payload(header: Header, nbytes: int) -> None:
    """Raise `ProtocolError` if a payload of `nbytes` cannot belong to `header`."""
    if nbytes > MAX_SEGMENT_BYTES:
        raise ProtocolError(f"a segment of {nbytes} bytes, at most {MAX_SEGMENT_BYTES} are allowed")
    if header.kind is Kind.ACK:
        if nbytes:
            raise ProtocolError(f"an acknowledgement with a payload of {nbytes} bytes")
    elif header.offset + nbytes > header.total_bytes:
        raise ProtocolError(f"{nbytes} bytes at byte {header.offset} of a message of {header.total_bytes} bytes")
    elif not nbytes and header.total_bytes:
        raise ProtocolError(f"an empty segment of a message of {header.total_bytes} bytes")


def intact(header: Header, payload: memoryview) -> bool:
    """Whether the payload matches the header's checksum."""
    return zlib.crc32(payload) == header.checksum
