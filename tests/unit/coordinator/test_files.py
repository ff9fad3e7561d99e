"""Files of checkpoints between nodes and the coordinator: machines, disk, and both sides together in one process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from coordinator.files import courier as courier_module
from coordinator.files.collector import Collector
from coordinator.files.courier import Courier
from coordinator.files.depot import Depot
from coordinator.files.messages import (
    PIECE_BYTES,
    Fetch,
    FileMessage,
    Offer,
    Piece,
    Taken,
    Want,
    file_tag,
    read_file_tag,
)
from coordinator.files.taking import LIMIT_S, RETRY_S, WINDOW, Taking
from coordinator.records.folder import checkpoint_folder
from netem.errors import IsthmusError, ProtocolError

STEP, NAME = 40, "node-3.safetensors"
HEAD = "0" * 32


def write(folder: Path, data: bytes, name: str = NAME, step: int = STEP) -> Path:
    path = checkpoint_folder(folder, step) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# The pieces of one file.


@pytest.mark.parametrize("total_bytes", [1, PIECE_BYTES, PIECE_BYTES + 1, 40 * PIECE_BYTES + 7])
def test_every_piece_is_asked_for_once_and_late_ones_again(total_bytes: int) -> None:
    taking = Taking(Offer(STEP, NAME, total_bytes, HEAD), 0.0)
    asked: list[int] = []
    now_s = 0.0
    while not taking.done:
        wants = taking.wants(now_s)
        asked += wants
        assert len(asked) == len(set(asked))
        assert len(wants) <= WINDOW
        for offset in wants:
            assert taking.arrived(offset, min(PIECE_BYTES, total_bytes - offset), now_s)
        now_s += 1.0
    assert asked == list(range(0, total_bytes, PIECE_BYTES))
    late = Taking(Offer(STEP, NAME, total_bytes, HEAD), 0.0)
    first = late.wants(0.0)
    assert late.wants(RETRY_S - 0.1) == []
    assert late.wants(RETRY_S) == first
    assert not late.is_late(LIMIT_S - 1)
    assert late.is_late(LIMIT_S)


def test_a_piece_of_another_length_or_place_does_not_count() -> None:
    taking = Taking(Offer(STEP, NAME, 2 * PIECE_BYTES, HEAD), 0.0)
    taking.wants(0.0)
    for offset, nbytes in ((0, 1), (1, PIECE_BYTES), (2 * PIECE_BYTES, PIECE_BYTES), (10**9, 5)):
        assert not taking.arrived(offset, nbytes, 1.0)
    assert taking.arrived(0, PIECE_BYTES, 1.0)
    assert not taking.arrived(0, PIECE_BYTES, 1.0), "it counts once"
    assert not taking.done


# Messages.


@pytest.mark.parametrize(
    ("message", "nbytes"),
    [
        (Offer(STEP, NAME, 5, HEAD), 0),
        (Want(STEP, "model.safetensors", 0), 0),
        (Piece(STEP, NAME, 0), PIECE_BYTES),
        (Taken(STEP, NAME, "why"), 0),
        (Fetch(STEP, NAME), 0),
    ],
)
def test_messages_cross_as_tags(message: FileMessage, nbytes: int) -> None:
    assert read_file_tag(file_tag(message), nbytes, "ann") == message
    with pytest.raises(ProtocolError, match="ann"):
        read_file_tag(file_tag(message), PIECE_BYTES + 1, "ann")


@pytest.mark.parametrize(
    "message",
    [
        Offer(STEP, "../../etc/passwd", 5, HEAD),
        Offer(STEP, "node-1.safetensors/..", 5, HEAD),
        Offer(STEP, "COMPLETE.json", 5, HEAD),
        Offer(-1, NAME, 5, HEAD),
        Offer(STEP, NAME, 0, HEAD),
        Offer(STEP, NAME, 1 << 60, HEAD),
        Offer(STEP, NAME, 5, "x"),
        Want(STEP, NAME, -5),
        Piece(STEP, NAME, 1 << 60),
    ],
)
def test_names_and_numbers_that_do_not_fit_are_refused(message: FileMessage) -> None:
    with pytest.raises(ProtocolError):
        read_file_tag(file_tag(message), 1 if isinstance(message, Piece) else 0, "ann")


# The coordinator's side.


def collector(folder: Path) -> Collector:
    return Collector(Depot(folder), 100)


def test_a_file_that_is_on_the_same_disk_is_not_sent(tmp_path: Path) -> None:
    write(tmp_path, b"weights")
    offer = Depot(tmp_path).offer(Fetch(STEP, NAME))
    assert offer is not None
    (reply,) = collector(tmp_path).receive("ann", offer, memoryview(b""), 0.0)
    assert reply.message == Taken(STEP, NAME)


def test_a_file_with_the_same_name_and_other_bytes_is_fetched_anew(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, b"WEIGHTS")
    write(there, b"weights")
    offer = Depot(there).offer(Fetch(STEP, NAME))
    assert offer is not None
    (reply,) = collector(here).receive("ann", offer, memoryview(b""), 0.0)
    assert isinstance(reply.message, Want)


def test_what_nobody_asked_for_is_not_written(tmp_path: Path) -> None:
    one = collector(tmp_path)
    assert one.receive("ann", Piece(STEP, NAME, 0), memoryview(b"x"), 0.0) == []
    (wants,) = one.receive("ann", Offer(STEP, NAME, 5, HEAD), memoryview(b""), 0.0)
    assert isinstance(wants.message, Want)
    assert one.receive("bob", Piece(STEP, NAME, 0), memoryview(b"xxxxx"), 0.0) == [], "ann's file is ann's"
    assert not Depot(tmp_path).path(Fetch(STEP, NAME)).exists()
    one.lose("ann")
    assert one.receive("ann", Piece(STEP, NAME, 0), memoryview(b"xxxxx"), 0.0) == []
    assert list(tmp_path.rglob("*.coming")) == []


def test_a_file_beyond_the_run_or_the_disk_is_refused_with_the_reason(tmp_path: Path) -> None:
    one = collector(tmp_path)
    (later,) = one.receive("ann", Offer(101, NAME, 5, HEAD), memoryview(b""), 0.0)
    assert later.message == Taken(101, NAME, "the run has 100 steps")
    (large,) = one.receive("ann", Offer(STEP, NAME, (1 << 42) - 1, HEAD), memoryview(b""), 0.0)
    assert isinstance(large.message, Taken)
    assert "free on the disk" in large.message.reason
    replies = [
        one.receive("ann", Offer(STEP, f"node-{index}.safetensors", 5, HEAD), memoryview(b""), 0.0)[0]
        for index in range(6)
    ]
    assert isinstance(replies[-1].message, Taken)
    assert "too many" in replies[-1].message.reason


def test_a_file_that_stops_coming_is_dropped_in_the_end(tmp_path: Path) -> None:
    one = collector(tmp_path)
    one.receive("ann", Offer(STEP, NAME, 5, HEAD), memoryview(b""), 0.0)
    assert [reply.message for reply in one.tick(RETRY_S + 1)] == [Want(STEP, NAME, 0)]
    assert list(tmp_path.rglob("*.coming"))
    assert one.tick(LIMIT_S + 1) == []
    assert list(tmp_path.rglob("*.coming")) == []


# Both sides.


class Loop:
    """A courier and a collector that talk through a thread; `lose` names the messages that get lost."""

    def __init__(self, node: Path, lead: Path, lose: Callable[[FileMessage], bool] = lambda message: False) -> None:
        self.courier = Courier(self, Depot(node), lambda: None)
        self.collector = collector(lead)
        self.idle = True
        self.sent: list[FileMessage] = []
        self._lose = lose
        self._queue: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._now_s = 0.0
        self._thread.start()

    def __enter__(self) -> Courier:
        return self.courier

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._thread.join(10)

    def send(self, peer: str, tag: bytes, buffers: Sequence[memoryview] = (), *, urgent: bool = False) -> None:
        assert urgent
        self._queue.put((tag, b"".join(buffers)))

    def is_idle(self, most_messages: int) -> bool:
        return self.idle

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            tag, data = item
            message = read_file_tag(tag, len(data), "ann")
            self.sent.append(message)
            self._now_s += 0.01
            replies = (
                [] if self._lose(message) else self.collector.receive("ann", message, memoryview(data), self._now_s)
            )
            for reply in replies + self.collector.tick(self._now_s):
                back = file_tag(reply.message)
                room = self.courier.admit(back, len(reply.data))
                assert room is not None
                room[:] = reply.data
                self.courier.deliver(back, room)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("total_bytes", [1, PIECE_BYTES, 3 * WINDOW * PIECE_BYTES + 11])
def test_a_file_is_handed_in_and_fetched_by_another_node(tmp_path: Path, total_bytes: int) -> None:
    data = os.urandom(total_bytes)
    write(tmp_path / "a", data)
    with Loop(tmp_path / "a", tmp_path / "lead") as ann:
        ann.hand_in(STEP, [NAME])
    assert Depot(tmp_path / "lead").path(Fetch(STEP, NAME)).read_bytes() == data
    with Loop(tmp_path / "b", tmp_path / "lead") as bob:
        assert bob.fetch(STEP, NAME)
        assert not bob.fetch(STEP, "node-7.safetensors")
        assert bob.fetch(STEP, NAME), "it is here now"
    assert Depot(tmp_path / "b").path(Fetch(STEP, NAME)).read_bytes() == data


@pytest.mark.timeout(60)
def test_on_the_same_disk_only_an_offer_crosses(tmp_path: Path) -> None:
    write(tmp_path, os.urandom(10 * PIECE_BYTES))
    loop = Loop(tmp_path, tmp_path)
    with loop as ann:
        ann.hand_in(STEP, [NAME])
    assert [type(message) for message in loop.sent] == [Offer]


@pytest.mark.timeout(60)
def test_a_lost_offer_is_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "RETRY_S", 0.3)
    write(tmp_path / "a", b"weights")
    lost = iter([True])
    with Loop(tmp_path / "a", tmp_path / "lead", lambda message: next(lost, False)) as ann:
        ann.hand_in(STEP, [NAME])
    assert Depot(tmp_path / "lead").path(Fetch(STEP, NAME)).read_bytes() == b"weights"


@pytest.mark.timeout(60)
def test_every_wait_has_a_limit_and_refusals_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "LIMIT_S", 0.6)
    write(tmp_path / "a", b"weights")
    with Loop(tmp_path / "a", tmp_path / "lead", lambda message: True) as ann:
        with pytest.raises(IsthmusError, match="no word for"):
            ann.hand_in(STEP, [NAME])
        with pytest.raises(IsthmusError, match="no word for"):
            ann.fetch(STEP, "node-9.safetensors")
    write(tmp_path / "a", b"weights", step=500)
    with Loop(tmp_path / "a", tmp_path / "lead") as ann:
        with pytest.raises(IsthmusError, match="the run has 100 steps"):
            ann.hand_in(500, [NAME])
        with pytest.raises(IsthmusError, match="is gone"):
            ann.hand_in(STEP, ["node-8.safetensors"])


@pytest.mark.timeout(60)
def test_pieces_wait_while_training_uses_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line that is never idle they go all the same, one after each wait."""
    waited: list[float] = []
    monkeypatch.setattr(courier_module.time, "sleep", waited.append)
    monkeypatch.setattr(courier_module, "PATIENCE_S", 0.05)
    write(tmp_path / "a", os.urandom(4 * PIECE_BYTES))
    loop = Loop(tmp_path / "a", tmp_path / "lead")
    loop.idle = False
    with loop as ann:
        ann.hand_in(STEP, [NAME])
    assert len(waited) > 4
    waited.clear()
    write(tmp_path / "a", os.urandom(4 * PIECE_BYTES), step=41)
    free = Loop(tmp_path / "a", tmp_path / "lead")
    with free as ann:
        ann.hand_in(41, [NAME])
    assert waited == []
