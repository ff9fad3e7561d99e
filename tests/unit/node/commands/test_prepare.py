"""`isthmus data prepare` leaves the tokens where a run finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import TINY, mistake

from node.cli import main

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 400
WORDS = ["data", "prepare", TINY, "--data.tokenizer", "bytes", "--data.cache", "cache", "--model.context", "64"]


def test_tokens_are_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(TEXT)
    words = [*WORDS, "--data.corpus", "./text.txt", "--coordinator.address", "tcp://10.0.0.5:7070"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("corpus:      ")
    assert "training" in first
    made = sorted(path for path in Path("cache").rglob("*") if path.is_file())
    assert made
    stamps = [path.stat().st_mtime_ns for path in made]
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert [path.stat().st_mtime_ns for path in made] == stamps


def test_a_corpus_that_is_none_or_too_small_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.txt" in mistake([*WORDS, "--data.corpus", "./none.txt"], capsys)
    Path("text.txt").write_text("Too short.")
    assert "model.context" in mistake([*WORDS, "--data.corpus", "./text.txt"], capsys)
