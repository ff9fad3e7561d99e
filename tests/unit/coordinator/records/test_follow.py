"""Following metrics.jsonl while it is written."""

from pathlib import Path

import pytest

from coordinator.records import follow
from coordinator.records.follow import Follower
from netem.errors import ConfigError


def steps(follower: Follower) -> list[int]:
    return [int(record["step"]) for record in follower.read()]


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert steps(follower) == []  # it does not exist yet
    with path.open("a") as file:
        file.write('{"step": 1}\n{"step"')
        file.flush()
        assert steps(follower) == [1]
        file.write(': 2}\n{"step": 3}\n')
        file.flush()
        assert steps(follower) == [2, 3]
    assert steps(follower) == []


def test_from_the_end_only_what_comes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    follower = Follower(path, from_end=True)
    path.write_text('{"step": 1}\n')  # a resumed run cuts the torn line off
    assert steps(follower) == []
    with path.open("a") as file:
        file.write('{"step": 2}\n')
    assert steps(follower) == [2]


def test_a_replaced_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    follower = Follower(path)
    assert steps(follower) == [1, 2]
    other.write_text('{"step": 7}\n')
    other.replace(path)
    assert steps(follower) == [7]


def test_a_long_file_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_MOST_BYTES", 16)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)) + '{"step": 5, "text": "longer"}\n')
    follower, seen = Follower(path), []
    for _ in range(6):
        seen += steps(follower)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_what_is_no_record_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    follower = Follower(path)
    assert steps(follower) == [1]
    with path.open("a") as file:
        file.write("[]\n")
    with pytest.raises(ConfigError, match="line 2"):
        follower.read()
