import contextlib

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netem.errors import ProtocolError
from netem.frames import VERSION, Header, Kind, check_payload, decode, encode, intact, stamped, unstamped

TAG_LIMIT = 4096
GOOD = Header(VERSION, "run", Kind.DATA, 1, 2, 3, 4, 5, 6, 0, 100, 7, b"tag")

whole = st.integers(0, 2**63 - 1)
headers = st.builds(
    lambda *fields: Header(VERSION, *fields),
    st.text(max_size=64).filter(lambda text: len(text.encode()) <= 64),
    st.just(Kind.DATA),
    whole,
    st.integers(1, 2**63 - 1),
    whole,
    whole,
    whole,
    whole,
    st.just(0),
    whole,
    st.integers(0, 2**32 - 1),
    st.binary(max_size=TAG_LIMIT),
)


@given(headers)
def test_a_header_reads_back(header: Header) -> None:
    assert decode(encode(header), max_tag_bytes=TAG_LIMIT) == header


@given(headers, st.floats(0, 1e9))
def test_a_stamp_comes_off_as_it_was_put_on(header: Header, due_s: float) -> None:
    head, stamp_s = unstamped(stamped(encode(header), due_s))
    assert head == encode(header)
    assert stamp_s == pytest.approx(due_s, abs=1e-6)


@pytest.mark.parametrize("nbytes", [0, 7, 8])
def test_a_frame_without_room_for_a_stamp_is_refused(nbytes: int) -> None:
    with pytest.raises(ProtocolError, match="too short for its stamp"):
        unstamped(bytes(nbytes))


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, max_tag_bytes=TAG_LIMIT)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(st.integers(0, 12), values)
def test_a_field_of_the_wrong_kind_is_a_protocol_error_or_a_legal_value(index: int, value: object) -> None:
    fields: list[object] = list(msgspec.structs.astuple(GOOD))
    fields[index] = value
    try:
        header = decode(msgpack.packb(fields), max_tag_bytes=TAG_LIMIT)
    except ProtocolError:
        return
    assert msgspec.structs.astuple(header)[index] == value


@given(st.integers(0, 60), st.integers(0, 255))
def test_a_damaged_byte_is_never_anything_but_a_protocol_error(position: int, byte: int) -> None:
    data = bytearray(encode(GOOD))
    data[position % len(data)] = byte
    with contextlib.suppress(ProtocolError):
        decode(bytes(data), max_tag_bytes=TAG_LIMIT)


def test_a_frame_of_the_version_without_a_stamp_is_named() -> None:
    old = msgpack.packb([1, "run", 0, *range(9), b"tag"])
    with pytest.raises(ProtocolError, match=r"not of version 2; do both sides run the same release\?"):
        unstamped(old)
    assert unstamped(stamped(encode(GOOD), 1.5)) == (encode(GOOD), 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "not of version 2"),
        ({"offset": 101, "tag": b""}, "byte 101 of a message of 100"),
        ({"offset": 50}, "a tag on a later segment"),
        ({"kind": Kind.ACK}, "an acknowledgement with a payload"),
        ({"incarnation": 0}, "incarnation"),
        ({"run_id": "r" * 65}, "malformed"),
        ({"tag": b"t" * (TAG_LIMIT + 1)}, "malformed"),
        ({"tag": b"t" * 10_000}, "at most"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(encode(msgspec.structs.replace(GOOD, **changes)), max_tag_bytes=TAG_LIMIT)


def test_payload_must_fit_its_header() -> None:
    check_payload(GOOD, 100)
    empty = msgspec.structs.replace(GOOD, total_bytes=0)
    check_payload(empty, 0)
    ack = msgspec.structs.replace(empty, kind=Kind.ACK)
    check_payload(ack, 0)
    for header, nbytes in ((GOOD, 101), (GOOD, 0), (empty, 1), (ack, 1), (GOOD, 2 * 1024 * 1024)):
        with pytest.raises(ProtocolError):
            check_payload(header, nbytes)


def test_a_damaged_payload_is_seen() -> None:
    header = msgspec.structs.replace(GOOD, checksum=0x352441C2)  # CRC-32 of "abc", as published
    assert intact(header, memoryview(b"abc"))
    assert not intact(header, memoryview(b"abd"))
