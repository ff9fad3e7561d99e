"""Messages from segments: what is asked of the upper floor, what is refused, what is dropped."""

import pytest

from netem.assembly import Assembler
from netem.errors import IsthmusError, ProtocolError
from netem.frames import VERSION, Header, Kind
from netem.limits import Limits
from netem.segments import Message

LIMITS = Limits(max_message_bytes=1000, max_open_messages=3)


class Upper:
    """Takes what is not tagged "no", finds fault with "bad"."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.delivered: list[tuple[str, int, bytes, bytes]] = []

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        self.asked.append((tag, total_bytes))
        if tag == b"bad":
            raise ProtocolError("an unknown layer", peer=peer, generation=generation)
        return None if tag == b"no" else memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.delivered.append((peer, generation, tag, bytes(buffer)))

    def failed(self, error: IsthmusError) -> None:
        raise AssertionError(error)


def header(message: int, offset: int, total_bytes: int, tag: bytes = b"", generation: int = 1) -> Header:
    return Header(VERSION, "r", Kind.DATA, generation, 1, 0, 0, 0, message, offset, total_bytes, 0, tag)


@pytest.fixture
def upper() -> Upper:
    return Upper()


@pytest.fixture
def assembler(upper: Upper) -> Assembler:
    return Assembler("b", upper, LIMITS)


def test_interleaved_messages(assembler: Assembler, upper: Upper) -> None:
    assert not assembler.add(header(0, 0, 5, b"x"), memoryview(b"abc"), 1)
    assert assembler.add(header(1, 0, 2, b"y"), memoryview(b"hi"), 1)
    assert assembler.add(header(2, 0, 0, b"z"), memoryview(b""), 1)
    assert assembler.add(header(0, 3, 5), memoryview(b"de"), 1)
    assert upper.delivered == [("b", 1, b"y", b"hi"), ("b", 1, b"z", b""), ("b", 1, b"x", b"abcde")]


def test_what_is_not_admitted_is_skipped_to_its_end(assembler: Assembler, upper: Upper) -> None:
    assert not assembler.add(header(0, 0, 5, b"no"), memoryview(b"abc"), 1)
    assert not assembler.add(header(0, 3, 5), memoryview(b"de"), 1)
    assert (upper.delivered, assembler.take_dropped(), assembler.take_dropped()) == ([], 1, 0)


def test_nonsense_in_a_tag_is_raised_once_and_the_message_skipped(assembler: Assembler, upper: Upper) -> None:
    with pytest.raises(ProtocolError, match="b: an unknown layer"):
        assembler.add(header(0, 0, 5, b"bad"), memoryview(b"abc"), 1)
    assert not assembler.add(header(0, 3, 5), memoryview(b"de"), 1)
    assert assembler.take_dropped() == 1
    assert assembler.add(header(1, 0, 1, b"x"), memoryview(b"f"), 1)


def test_an_older_generation_is_dropped_before_anyone_is_asked(assembler: Assembler, upper: Upper) -> None:
    assert not assembler.add(header(0, 0, 5, b"x", generation=1), memoryview(b"abc"), 2)
    assert not assembler.add(header(0, 3, 5, generation=1), memoryview(b"de"), 2)
    assert (upper.asked, assembler.take_dropped()) == ([], 1)
    assert assembler.add(header(1, 0, 1, b"y", generation=3), memoryview(b"f"), 2)  # a peer may be ahead


def test_a_message_under_way_is_dropped_when_its_generation_is_over(assembler: Assembler, upper: Upper) -> None:
    assembler.add(header(0, 0, 5, b"x"), memoryview(b"abc"), 1)
    assembler.add(header(1, 0, 5, b"y", generation=2), memoryview(b"abc"), 1)
    assembler.retire(2)
    assert assembler.take_dropped() == 1
    assert not assembler.add(header(0, 3, 5), memoryview(b"de"), 2)
    assert assembler.add(header(1, 3, 5, generation=2), memoryview(b"de"), 2)
    assert [tag for _, _, tag, _ in upper.delivered] == [b"y"]


def test_a_newer_message_ends_what_its_sender_has_given_up(assembler: Assembler, upper: Upper) -> None:
    """Whoever raises its generation drops the rest of older messages; a receiver that lags must not keep them."""
    assembler.add(header(0, 0, 5, b"x"), memoryview(b"abc"), 0)
    assembler.add(header(1, 0, 1, b"y", generation=2), memoryview(b"a"), 0)
    assert assembler.take_dropped() == 1
    assert not assembler.add(header(0, 3, 5), memoryview(b"de"), 0)
    assembler.reset()  # a new life may know less
    assert assembler.add(header(0, 0, 1, b"z"), memoryview(b"a"), 0)


def test_generation_0_is_never_stale(assembler: Assembler, upper: Upper) -> None:
    assembler.add(header(0, 0, 5, b"x", generation=0), memoryview(b"abc"), 7)
    assembler.add(header(1, 0, 1, b"y", generation=7), memoryview(b"a"), 7)
    assembler.retire(8)
    assert assembler.add(header(0, 3, 5, generation=0), memoryview(b"de"), 8)
    assert assembler.take_dropped() == 0


def test_sizes_are_checked_before_anyone_is_asked(assembler: Assembler, upper: Upper) -> None:
    with pytest.raises(ProtocolError, match="1001 bytes, at most 1000"):
        assembler.add(header(0, 0, 1001, b"x"), memoryview(b"abc"), 1)
    assert (upper.asked, assembler.take_dropped()) == ([], 1)
    assembler.add(header(0, 3, 1001), memoryview(bytes(998)), 1)  # skipped to its end, and then forgotten
    for ident in range(3):
        assembler.add(header(ident, 0, 2, b"x"), memoryview(b"a"), 1)


def test_order_is_checked(assembler: Assembler, upper: Upper) -> None:
    with pytest.raises(ProtocolError, match="without a beginning"):
        assembler.add(header(0, 3, 5), memoryview(b"de"), 1)
    assembler.add(header(1, 0, 5, b"x"), memoryview(b"a"), 1)
    with pytest.raises(ProtocolError, match="at the wrong byte"):
        assembler.add(header(1, 2, 5), memoryview(b"c"), 1)
    assembler.add(header(2, 0, 5, b"x"), memoryview(b"a"), 1)
    with pytest.raises(ProtocolError, match="begins twice"):
        assembler.add(header(2, 0, 5, b"x"), memoryview(b"a"), 1)
    assert upper.delivered == []


def test_messages_begun_and_not_finished_are_bounded(assembler: Assembler) -> None:
    for ident in range(3):
        assembler.add(header(ident, 0, 5, b"x"), memoryview(b"a"), 1)
    with pytest.raises(ProtocolError, match="more than 3 messages"):
        assembler.add(header(3, 0, 5, b"x"), memoryview(b"a"), 1)
    assembler.reset()
    assembler.add(header(0, 0, 5, b"x"), memoryview(b"a"), 1)


@pytest.mark.parametrize("segment_bytes", [1, 3, 7, 100])
def test_what_is_cut_from_several_buffers_is_whole_again(
    assembler: Assembler, upper: Upper, segment_bytes: int
) -> None:
    parts = [b"abc", b"", b"defghij", b"k"]
    message = Message(b"t", [memoryview(part) for part in parts])
    while True:
        segment = message.cut(segment_bytes)
        tag = b"" if segment.offset else message.tag
        done = assembler.add(header(0, segment.offset, message.total_bytes, tag), memoryview(segment.payload), 1)
        assert done == segment.last
        if done:
            break
    assert upper.delivered == [("b", 1, b"t", b"abcdefghijk")]


def test_what_starts_over_counts_as_sent_again() -> None:
    message = Message(b"t", [memoryview(bytes(10))])
    assert not message.cut(6).resent
    message.rewind()
    again = message.cut(6)
    assert (again.offset, again.nbytes, again.resent) == (0, 6, True)


def test_a_segment_within_one_buffer_is_not_copied() -> None:
    buffer = bytearray(100)
    message = Message(b"t", [memoryview(buffer)])
    segment = message.cut(60)
    buffer[5] = 7
    assert segment.payload[5] == 7
