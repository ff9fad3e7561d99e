"""Tags come back as they went, and anything else is a protocol error that names the peer."""

import contextlib
from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.errors import ProtocolError
from node.config import FormatName
from node.exchange.tags import ChunkTag, Piece, RingTag, Tag, decode_tag, encode_tag

index = st.integers(0, 1 << 40)
shapes = st.lists(st.lists(index, max_size=4).map(tuple), max_size=4).map(tuple)
chunk_tags = st.builds(
    ChunkTag,
    st.sampled_from(["kv", "grad", "done"]),
    *[index] * 4,
    st.booleans(),
    st.sampled_from(get_args(FormatName)),
    shapes,
    st.none() | st.builds(Piece, index, st.integers(1, 1 << 16), st.integers(0, (1 << 32) - 1), st.booleans()),
)
GOOD = ["chunk", "kv", 3, 0, 1, 16, True, "float32", [[2, 16, 6]], None]


@given(chunk_tags | st.builds(RingTag, index, index, index))
def test_tags_come_back(tag: Tag) -> None:
    assert decode_tag(encode_tag(tag), "peer") == tag


def test_the_layout_of_a_tag() -> None:
    """What is on the wire, for other versions to read."""
    tag = ChunkTag("kv", 3, 0, 1, 16, True, "float32", ((2, 16, 6),))
    assert msgpack.unpackb(encode_tag(tag)) == GOOD
    piece = ChunkTag("kv", 3, 0, 1, 16, True, "float32", ((2, 16, 6),), Piece(2, 8, 77, True))
    assert msgpack.unpackb(encode_tag(piece)) == [*GOOD[:-1], [2, 8, 77, True]]
    assert msgpack.unpackb(encode_tag(RingTag(7, 2, 1))) == ["ring", 7, 2, 1]


def changed(place: int, value: object) -> bytes:
    tree: list[object] = list(GOOD)
    tree[place] = value
    return bytes(msgpack.packb(tree))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(GOOD)[:-1],
        msgpack.packb(GOOD) + b"\x00",
        msgpack.packb(GOOD[:-2]),
        msgpack.packb([*GOOD, 1]),
        msgpack.packb({"kind": "kv"}),
        msgpack.packb(5),
        msgpack.packb(None),
        msgpack.packb(["ring", 1, 2]),
        msgpack.packb(["ring", 1, 2, 3, 4]),
        msgpack.packb(["other", 1, 2, 3]),
        changed(1, "weights"),
        changed(2, -1),
        changed(2, (1 << 40) + 1),
        changed(2, 1.0),
        changed(2, "1"),
        changed(6, 1),
        changed(7, "float64"),
        changed(8, [[2, -16, 6]]),
        changed(8, [["a"]]),
        changed(8, 3),
        changed(8, [[1] * 65]),
        changed(1, "k" * 65),
        changed(9, 2),
        changed(9, [2, 8, 77]),
        changed(9, [2, 0, 77, True]),
        changed(9, [-1, 8, 77, True]),
        changed(9, [2, 8, 1 << 32, True]),
        changed(9, [2, 8, 77, 1]),
        changed(3, msgpack.ExtType(5, b"x")),
        changed(3, msgpack.Timestamp(1, 2)),
        b"\x91" * 5000,
    ],
)
def test_nonsense_is_refused_with_the_peers_name(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="node-3: a tensor came with a malformed tag") as caught:
        decode_tag(data, "node-3")
    assert caught.value.peer == "node-3"


@given(st.binary(max_size=60))
def test_no_bytes_do_worse_than_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_tag(data, "peer")
