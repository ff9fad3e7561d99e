"""From the nodes' values to the run's, and to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.events import NetworkChange, Record
from coordinator.records.recorder import Recorder, aggregate

NODES = {
    "node-0": {"loss_sum": 6.0, "tokens": 3.0, "sent_bytes": 10.0, "exposed_s": 0.5, "lr": 0.1, "tokens_per_s": 5.0},
    "node-1": {"loss_sum": 1.0, "tokens": 1.0, "sent_bytes": 32.0, "exposed_s": 0.2, "lr": 0.3, "tokens_per_s": 6.0},
}


def test_the_rules_by_ending() -> None:
    totals = aggregate(NODES)
    assert totals == pytest.approx(
        {
            "loss_sum": 7.0,
            "tokens": 4.0,
            "loss": 1.75,  # per token of both, not the mean of 2 and 1
            "sent_bytes": 42.0,
            "exposed_s": 0.5,
            "lr": 0.2,
            "tokens_per_s": 11.0,
        }
    )


def test_held_out_loss_is_per_held_out_token_and_only_where_it_was_measured() -> None:
    totals = aggregate({"a": {"heldout_loss_sum": 4.0, "heldout_tokens": 2.0}, "b": {"tokens": 0.0, "loss_sum": 0.0}})
    assert totals["heldout_loss"] == 2.0
    assert "loss" not in totals


def test_a_line_a_step_is_there_at_once_and_the_board_has_its_events(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run", clock=lambda: 1000.0) as recorder:
        recorder.record(Record(1, 4, NODES))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        recorder.record(Record(2, 4, {"node-0": {"step": 9.0, "loss_sum": float("nan"), "tokens": 1.0}}))
    first = json.loads(lines[0])
    assert len(lines) == 1
    assert (first["step"], first["time"], first["generation"], first["loss"]) == (1, 1000.0, 4, 1.75)
    assert first["nodes"] == NODES
    second = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert second["step"] == 2
    assert second["loss"] is None
    assert second["nodes"]["node-0"]["loss_sum"] is None
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"sent_bytes" in events.read_bytes()


def test_a_line_says_how_the_network_has_changed_and_others_say_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(1, 1, NODES))
        recorder.record(Record(2, 1, NODES, [NetworkChange(2.5, "all cuts healed")]))
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "network" not in first
    assert second["network"] == [{"at_s": 2.5, "change": "all cuts healed"}]


def test_a_line_that_was_cut_off_is_taken_away(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(1, 1, NODES))
        recorder.record(Record(2, 1, NODES))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(2, 1, NODES))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_bytes(b'{"st')
    Recorder(tmp_path).close()
    assert path.read_bytes() == b""


def test_a_resumed_run_adds_to_the_file(tmp_path: Path) -> None:
    for step in (1, 2):
        with Recorder(tmp_path) as recorder:
            recorder.record(Record(step, 1, NODES))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_under_time_dilation_a_line_has_both_clocks(tmp_path: Path) -> None:
    with Recorder(tmp_path, dilation=50.0) as recorder:
        recorder.record(Record(1, 1, {"node-0": {"step_s": 5.0}, "node-1": {"step_s": 2.0}}))
        recorder.record(Record(2, 1, {"node-0": {"tokens": 1.0}}))
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step_s"], first["emulated_step_s"], first["dilation"]) == (5.0, 0.1, 50.0)
    assert (second["dilation"], "emulated_step_s" in second) == (50.0, False)
    with Recorder(tmp_path / "plain") as recorder:
        recorder.record(Record(1, 1, {"node-0": {"step_s": 5.0}}))
    assert "dilation" not in json.loads((tmp_path / "plain" / "metrics.jsonl").read_text())
