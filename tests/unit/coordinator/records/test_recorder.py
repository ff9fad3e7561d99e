"""From the nodes' values to the run's, and to files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from tensorboardX.proto.event_pb2 import Event

from coordinator.events import Fault, NetworkChange, Record
from coordinator.records import line_file
from coordinator.records.board import Board
from coordinator.records.rates import faults
from coordinator.records.recorder import Recorder, aggregate
from netem.errors import ConfigError

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


def test_peaks_are_the_largest_and_what_is_of_one_layer_or_link_is_not_added_up() -> None:
    nodes = {
        "a": {"memory_peak_bytes": 5.0, "rss_bytes": 5.0, "layer/3/exposed_forward_s": 1.0, "link/b/missed_s": 1.0},
        "b": {"memory_peak_bytes": 7.0, "rss_bytes": 7.0, "mfu": 0.5},
    }
    assert aggregate(nodes) == {"memory_peak_bytes": 7.0, "rss_bytes": 12.0, "mfu": 0.5}


def test_what_was_refused_is_of_all_nodes_and_of_the_coordinator(tmp_path: Path) -> None:
    nodes = {"a": {"refused_connections": 3.0}, "b": {"refused_connections": 4.0}}
    with Recorder(tmp_path / "run") as recorder:
        line = recorder.record(Record(1, 4, nodes, (), {"refused_connections": 10.0, "refused_requests": 2.0}))
        quiet = recorder.record(Record(2, 4, NODES))
    assert (line["refused_connections"], line["refused_requests"]) == (17.0, 2.0)
    assert "refused_connections" not in quiet


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


def test_a_resumed_run_says_which_steps_have_no_record(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.record(Record(step, 1, NODES))
        assert recorder.missing == ""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    with Recorder(tmp_path, done=3) as recorder:
        assert recorder.missing == "3"
    with Recorder(tmp_path, done=2) as recorder:  # step 3 is done again
        assert recorder.missing == ""


def test_what_is_no_metrics_file_is_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "a" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder in place of the metrics file"):
        Recorder(tmp_path / "a")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="line 1: not UTF-8"):
        Recorder(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\xff\n"


def test_tensorboard_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    def purged(done: int) -> list[int]:
        with Recorder(tmp_path / str(done), done=done) as recorder:
            recorder.record(Record(done + 1, 1, NODES))
        (path,) = (tmp_path / str(done) / "tensorboard").iterdir()
        return [event.step for event in events(path) if event.HasField("session_log")]

    assert purged(0) == []
    assert purged(6) == [7]


def events(path: Path) -> list[Any]:
    """The events of a TensorBoard file: an eight-byte length, its checksum, the event, its checksum."""
    content, found = path.read_bytes(), []
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12:end]))
        content = content[end + 4 :]
    return found


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_that_is_deleted_is_noticed_at_the_next_step(tmp_path: Path, what: str) -> None:
    with Recorder(tmp_path / "run") as recorder:
        recorder.record(Record(1, 1, NODES))
        if what == "folder":
            shutil.rmtree(tmp_path / "run")
        else:
            (tmp_path / "run" / "metrics.jsonl").unlink()
        with pytest.raises(OSError, match=r"metrics\.jsonl was deleted or moved while the run went on"):
            recorder.record(Record(2, 1, NODES))


class Disk:
    """Stands for `os.write`: there is room for so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room_bytes, self.errno = 1 << 30, errno.ENOSPC
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        if not self.room_bytes:
            raise OSError(self.errno, os.strerror(self.errno))
        taken = self._write(file, data[: self.room_bytes])
        self.room_bytes -= taken
        return taken


def test_a_full_disk_is_told_once_and_what_it_did_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(monkeypatch)
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(1, 1, NODES))
        disk.room_bytes = 100  # in the middle of a line
        shown = [recorder.record(Record(step, 1, NODES)) for step in (2, 3)]
        whole = (tmp_path / "metrics.jsonl").read_text()
        assert [json.loads(line)["step"] for line in whole.splitlines()] == [1], "no torn line"
        assert [fault["kind"] for fault in shown[1]["faults"]] == ["disk"], "those who watch hear of it at once"
        disk.room_bytes = 1 << 30
        recorder.record(Record(4, 1, NODES))
    assert [json.loads(line)["kind"] for line in (tmp_path / "faults.jsonl").read_text().splitlines()] == ["disk"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"after step 2: the coordinator's disk is full ({tmp_path}); training goes on, and the steps are recorded "
        "once there is room",
        "after step 4: the coordinator's disk has room again",
    ]


def test_too_many_lines_that_wait_make_room_and_a_disk_that_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(line_file, "MOST_WAITING", 2)
    disk = Disk(monkeypatch)
    with Recorder(tmp_path) as recorder:
        disk.room_bytes = 0
        for step in range(1, 6):
            recorder.record(Record(step, 1, NODES))
        disk.room_bytes = 1 << 30
        recorder.record(Record(6, 1, NODES))
        assert "4 steps have no record" in caplog.text
        disk.room_bytes, disk.errno = 0, errno.EIO
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
            recorder.record(Record(7, 1, NODES))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 6]


def test_a_board_on_a_full_disk_has_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(1, 1, NODES))
        with monkeypatch.context() as full:
            full.setattr(Board, "add", raising_enospc)
            recorder.record(Record(2, 1, NODES))
        recorder.record(Record(3, 1, NODES))
    steps = {event.step for path in (tmp_path / "tensorboard").iterdir() for event in events(path)}
    assert steps - {0} == {1, 3}


def raising_enospc(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_board_writes_in_a_thread_of_its_own(tmp_path: Path) -> None:
    """There a full disk would be a traceback of which the run is not told."""
    before = threading.active_count()
    with Recorder(tmp_path):
        assert threading.active_count() == before


def test_values_that_are_not_finite_or_too_large_to_add_are_null(tmp_path: Path) -> None:
    huge, inf = {"a_sum": 1e308, "b_s": float("inf")}, {"a_sum": 1e308, "b_s": 1.0, "c_sum": -float("inf")}
    with Recorder(tmp_path) as recorder:
        recorder.record(Record(1, 1, {"x": huge | {"c_sum": float("inf")}, "y": inf}))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["a_sum"], line["b_s"], line["c_sum"]) == (None, None, None)


def test_records_are_written_without_loading_torch() -> None:
    """The coordinator needs no torch, and tensorboardX would load it."""
    script = "import sys, coordinator.records.recorder; assert 'torch' not in sys.modules; import torch; torch.zeros(1)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def test_a_fault_is_a_line_of_its_own_and_in_the_next_record(tmp_path: Path) -> None:
    lost = Fault("lost", ("node-1",), "node-1 was lost: silent for 15 s", 7, 3, 15.0, 4, "generation 5 has …", 0.25)
    with Recorder(tmp_path, clock=lambda: 1000.0) as recorder:
        recorder.fault(lost)
        first = recorder.record(Record(8, 5, {"node-0": {"tokens": 1.0}}))
        second = recorder.record(Record(9, 5, {"node-0": {"tokens": 1.0}}))
    (line,) = [json.loads(text) for text in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert first["faults"] == [line]
    assert "faults" not in second
    assert (line["kind"], line["nodes"], line["lost_steps"]) == ("lost", ["node-1"], 4)
    assert (line["since"], line["time"], line["cost_s"]) == (984.75, 1000.0, 0.25)
    assert faults([first, second]) == [(7, "lost", "node-1 was lost: silent for 15 s")]
