"""A small state on disk, written over many times and read back after `kill -9`, a power failure or a full disk.

The file has two slots of one size. A state is written into the one that holds the older state, with a number and a
digest, and is on the disk when `write` returns. So one whole state is there at any time. The file has its full size
from the start: a disk that fills up later does not stop it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from coordinator.records.folder import whole_file

STATE = "coordinator.state"
"""The name of a coordinator's file in its run's folder."""

_DIGEST_BYTES = 16
_HEAD_BYTES = _DIGEST_BYTES + 8 + 8  # the digest of all that follows, the state's number, its length


class StateFile:
    """The file at `path`, for one writer. Raises `OSError` where the disk fails.

    A file that is there already keeps its newest state until the next one is written; one of another slot size is made
    anew with it.
    """

    def __init__(self, path: Path, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        states = _states(path)
        self._number = max(states, default=0)
        if not path.exists() or path.stat().st_size != 2 * slot_bytes:
            newest = _slot(self._number, states[self._number], slot_bytes) if states else b""
            with whole_file(path, durable=True) as unfinished:
                unfinished.write_bytes(newest.ljust(2 * slot_bytes, b"\0"))
            self._place = 1
        else:
            self._place = 1 - _place_of(path, self._number)
        self._file = os.open(path, os.O_WRONLY)

    def __enter__(self) -> StateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, state: bytes) -> None:
        """Put a state on the disk, in place of the one before the last. Raises `ValueError` where it is too long."""
        slot = _slot(self._number + 1, state, self._slot_bytes)
        written = 0
        while written < len(slot):
            written += os.pwrite(self._file, slot[written:], self._place * self._slot_bytes + written)
        os.fsync(self._file)
        self._number += 1
        self._place = 1 - self._place

    def close(self) -> None:
        """Close the file, which stays. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_state(path: Path) -> bytes | None:
    """The newest whole state in a file; None where there is no file, or no whole state in it. Raises `OSError`."""
    states = _states(path)
    return states[max(states)] if states else None


def drop_state(path: Path) -> None:
    """Remove the file: its state is of no use any more."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _slot(number: int, state: bytes, slot_bytes: int) -> bytes:
    if _HEAD_BYTES + len(state) > slot_bytes:
        raise ValueError(f"a state of {len(state)} bytes, at most {slot_bytes - _HEAD_BYTES} have room")
    rest = number.to_bytes(8, "little") + len(state).to_bytes(8, "little") + state
    return hashlib.blake2b(rest, digest_size=_DIGEST_BYTES).digest() + rest


def _states(path: Path) -> dict[int, bytes]:
    """The whole states in a file, by their numbers."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    half = len(content) // 2
    return dict(filter(None, (_parsed(content[:half]), _parsed(content[half:]))))


def _parsed(slot: bytes) -> tuple[int, bytes] | None:
    digest, rest = slot[:_DIGEST_BYTES], slot[_DIGEST_BYTES:]
    number, length = int.from_bytes(rest[:8], "little"), int.from_bytes(rest[8:16], "little")
    whole = rest[: 16 + length]
    if len(rest) < 16 + length or hashlib.blake2b(whole, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    return number, whole[16:]


def _place_of(path: Path, number: int) -> int:
    """In which slot the state of this number is; 1 where there is none, so that the next one is written to slot 0."""
    content = path.read_bytes()
    first = _parsed(content[: len(content) // 2])
    return 0 if first is not None and first[0] == number else 1
