"""What is read back from metrics.jsonl: whole records, or one line that names the file and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.records.metrics import cut_torn_line, describe_steps, missing_steps, read_records, without_repeats
from netem.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00\xff\xfe\n", "line 1: not UTF-8 text"),
        (b'{"step": 1}\n\n', "line 2: not JSON"),
        (b"[" * 100_000 + b"\n", "line 1: nested too deep"),
        (b"[1]\n", "line 1: expected a record with a step"),
        (b'{"loss": 1}\n', "line 1: expected a record with a step"),
        (b'{"step": "1"}\n', "line 1: expected a record with a step"),
        (b'{"step": 1e999}\n', "line 1: expected a record with a step"),
        (b'{"step": 1, "nodes": [2]}\n', "line 1: expected a record with a step"),
        (b'{"step": 1, "nodes": {"a": 2}}\n', "line 1: expected a record with a step"),
    ],
)
def test_other_content_is_refused_by_its_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, ")
    assert str(caught.value).endswith("restore the file, or move it away: a resumed run starts a new one")


def test_no_file_and_a_folder_in_its_place_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; give the folder of a run"):
        read_records(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="is a folder in place of the metrics file"):
        read_records(tmp_path)


def test_a_line_that_is_just_being_written_does_not_count_and_an_endless_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": {"9" * 5000}}}\n{{"step": 2, "lo')
    assert read_records(path) == [{"step": 1, "loss": float("inf")}]
    assert cut_torn_line(path)
    assert path.read_bytes().endswith(b"}\n")
    assert not cut_torn_line(path)
    assert not cut_torn_line(tmp_path / "none")


def test_of_steps_that_were_done_again_the_later_count() -> None:
    records = [{"step": float(step), "try": place} for place, step in enumerate([1, 2, 3, 2, 3, 4])]
    assert [record["try"] for record in without_repeats(records)] == [0, 3, 4, 5]


@pytest.mark.parametrize(
    ("recorded", "done", "expected"),
    [([1, 2, 3], 3, ""), ([1, 3], 3, "2"), ([1, 2], 4, "3 to 4"), ([2, 9, 2, 5], 6, "1, 3 to 4, 6"), ([], 2, "1 to 2")],
)
def test_steps_without_a_record_are_named(recorded: list[int], done: int, expected: str) -> None:
    assert describe_steps(missing_steps([{"step": float(step)} for step in recorded], done)) == expected
