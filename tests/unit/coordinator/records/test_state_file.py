"""A state on disk: at any time a whole one is there, whatever was cut off or spoiled while it was written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from coordinator.records.state_file import StateFile, drop_state, read_state

SLOT = 4096


def test_the_newest_state_is_read_back_and_the_file_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert read_state(path) is None
    with StateFile(path, SLOT) as file:
        assert read_state(path) is None
        for number in range(5):
            file.write(b"state %d" % number * (number + 1))
            assert read_state(path) == b"state %d" % number * (number + 1)
            assert path.stat().st_size == 2 * SLOT
    drop_state(path)
    drop_state(path)
    assert read_state(path) is None


def test_a_later_writer_goes_on_where_the_one_before_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for number in range(5):
        file = StateFile(path, SLOT)
        assert read_state(path) == (b"%d" % (number - 1) if number else None)
        file.write(b"%d" % number)
        file.close()
        file.close()
    with StateFile(path, 2 * SLOT) as file:  # the run has more nodes now
        assert read_state(path) == b"4"
        file.write(b"5")
        assert read_state(path) == b"5"
        file.write(b"6")
        assert read_state(path) == b"6"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_way_to_spoil_the_slot_that_is_being_written_leaves_the_state_before(tmp_path: Path, number: int) -> None:
    """Cut off after each byte, as by a power failure, with what was there before behind it; and any byte flipped."""
    path = tmp_path / "state"
    with StateFile(path, SLOT) as file:
        for each in range(number):
            file.write(b"the state %d" % each)
        before = path.read_bytes()
        file.write(b"the state after it")
        after = path.read_bytes()
    changed = [place for place in range(len(after)) if after[place] != before[place]]
    for place in changed:
        path.write_bytes(after[:place] + before[place:])
        assert read_state(path) == b"the state %d" % (number - 1)
    for place in changed:
        flipped = bytearray(after)
        flipped[place] ^= 0x40
        path.write_bytes(flipped)
        assert read_state(path) == b"the state %d" % (number - 1)
    path.write_bytes(after)
    assert read_state(path) == b"the state after it"


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(100), b"\xff" * 2 * SLOT], ids=["empty", "short", "zeros", "ones"]
)
def test_a_file_without_a_whole_state_has_none_and_can_be_written(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    assert read_state(path) is None
    with StateFile(path, SLOT) as file:
        file.write(b"new")
    assert read_state(path) == b"new"


def test_a_state_without_room_is_our_own_fault_and_changes_nothing(tmp_path: Path) -> None:
    with StateFile(tmp_path / "state", SLOT) as file:
        file.write(b"before")
        with pytest.raises(ValueError, match="a state of 4096 bytes, at most 4064 have room"):
            file.write(bytes(SLOT))
        file.write(bytes(SLOT - 32))
    assert read_state(tmp_path / "state") == bytes(SLOT - 32)


WRITER = """
import sys, pathlib
from coordinator.records.state_file import StateFile
with StateFile(pathlib.Path(sys.argv[1]), 4096) as file:
    for number in range(10**9):
        file.write(b"%d" % number * 100)
        print(number, flush=True)
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_what_it_had_said(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for delay_s in (0.0, 0.003, 0.011):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ
        )
        with writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay_s)
            writer.kill()
            said = [0, *(int(line) for line in writer.stdout.read().splitlines() if line.isdigit())]
            writer.wait(timeout=30)
        state = read_state(path)
        assert state is not None
        assert state[: len(state) // 100] * 100 == state
        assert int(state[: len(state) // 100]) >= said[-2] if len(said) > 1 else True
