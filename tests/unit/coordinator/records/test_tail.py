"""The lines that a watcher is given."""

from __future__ import annotations

import json

from coordinator.records.tail import MOST_BYTES, MOST_LINES, Tail


def steps(lines: list[str]) -> list[int]:
    return [json.loads(line)["step"] for line in lines]


def test_lines_are_given_once_and_a_late_watcher_gets_the_last_ones() -> None:
    tail = Tail()
    assert tail.after(0) == ([], 0)
    for step in range(1, 4):
        tail.add({"step": step, "nodes": {}})
    lines, number = tail.after(0)
    assert (steps(lines), number) == ([1, 2, 3], 3)
    assert tail.after(3) == ([], 3)
    tail.add({"step": 4, "nodes": {}})
    assert steps(tail.after(3)[0]) == [4]
    for step in range(5, 2 * MOST_LINES):
        tail.add({"step": step, "nodes": {}})
    lines, number = tail.after(2)
    assert (steps(lines)[0], len(lines), number) == (MOST_LINES, MOST_LINES, 2 * MOST_LINES - 1)


def test_a_coordinator_that_has_started_again_counts_anew() -> None:
    tail = Tail()
    tail.add({"step": 9, "nodes": {}})
    lines, number = tail.after(50)
    assert (steps(lines), number) == ([9], 1)


def test_an_answer_fits_into_a_message() -> None:
    tail = Tail()
    wide = {f"node-{rank}": {f"link/{peer}": 1.5 for peer in range(100)} for rank in range(100)}
    for step in range(20):
        tail.add({"step": step, "loss": 2.0, "nodes": wide})
    lines, _ = tail.after(0)
    assert 1 < len(lines) < 20
    assert sum(map(len, lines)) <= MOST_BYTES
    tail.add({"step": 20, "loss": 2.0, "nodes": {"a": {"key": "x" * MOST_BYTES}}})
    last = json.loads(tail.after(0)[0][-1])
    assert (last["step"], last["loss"], last["nodes"]) == (20, 2.0, {})
