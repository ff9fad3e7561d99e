"""The trace of a step: what the format's viewers need of it, clocks that are set, and files that are no traces.

The rules are those of the Trace Event Format: every event has a phase, a process, a thread and a time in microseconds;
complete events have a duration, and nest on their thread; a flow has one beginning and one end with the same id, each
inside a slice of its thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.coordinated import Coordinator, Session, make_trainer
from helpers.meters import make_meter
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, tiny_config

from netem.errors import ConfigError
from node.cli import main
from node.measure.spans import KINDS, Sent, Span, Taken
from node.measure.trace_file import StepLine, read_steps
from node.train.world import build_world
from node.watch.trace import LINKS, SEVERAL_CLOCKS, TRAINER, trace

SMALLEST_US = 0.002
"""Times are rounded to a nanosecond."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes over wires and inboxes, of which steps 4 (with a round) and 5 are recorded."""
    folder = tmp_path_factory.mktemp("traced")
    config = tiny_config(train={"steps": 5, "sync_every": 2})
    loop = Loop(config, WORLDS["2x2"])
    shared = Coordinator(config, WORLDS["2x2"], 5)

    def work(rank: int, _: ThreadWire) -> None:
        members, wire, spans = loop.members[rank], loop.wires[rank], loop.recorders[rank]
        world = build_world(members, loop.payload, wire, Session(shared, rank), folder, recorder=spans)
        trainer = make_trainer(config, loop.payload)
        trainer.run(world, Session(shared, rank), make_meter(spans, folder, wire, members, traced=(4, 5)))

    run_ranks(2, work)
    return folder


def check(written: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The events by phase, once all rules hold."""
    events = written["traceEvents"]
    phases: dict[str, list[dict[str, Any]]] = {"M": [], "X": [], "s": [], "f": []}
    for event in events:
        assert event.keys() >= {"ph", "name", "pid", "tid", "ts"}
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["ts"] >= 0
        phases[event["ph"]].append(event)
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert all(event["dur"] >= 0 and isinstance(event["args"], dict) for event in phases["X"])
    named = {(event["pid"], event["tid"]) for event in phases["M"] if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in phases["X"]}
    slices = {place: [e for e in phases["X"] if (e["pid"], e["tid"]) == place] for place in named}
    for on_thread in slices.values():
        check_nesting(on_thread)
    starts, ends = ({event["id"]: event for event in phases[phase]} for phase in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == len(phases["s"]) == len(phases["f"])
    for number, start in starts.items():
        assert start["ts"] <= ends[number]["ts"]
        assert start["name"] == ends[number]["name"]
        assert ends[number]["bp"] == "e"
        for end in (start, ends[number]):
            inside = slices[end["pid"], end["tid"]]
            assert any(e["ts"] <= end["ts"] <= e["ts"] + e["dur"] + SMALLEST_US for e in inside)
    return phases


def check_nesting(slices: list[dict[str, Any]]) -> None:
    open_until: list[float] = []
    for event in slices:
        while open_until and event["ts"] >= open_until[-1] - SMALLEST_US:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + SMALLEST_US, event
        open_until.append(end)


@pytest.mark.parametrize(("step", "evaluation"), [(4, 0), (5, 2 * 6)])
def test_a_recorded_step_is_a_trace_that_viewers_take(run: Path, step: int, evaluation: int) -> None:
    written = trace(read_steps(run)[step], "traced")
    phases = check(json.loads(json.dumps(written)))
    assert written["otherData"]["step"] == step
    kinds = {event["name"].partition(",")[0] for event in phases["X"] if event["tid"] < LINKS} - {f"step {step}"}
    assert kinds <= KINDS.keys()
    expected = {"wait for Go", "forward", "backward", "optimizer", "encode", "decode", "send", "wait for a payload"}
    assert expected | ({"averaging", "wait for a shard"} if step == 4 else set()) <= kinds
    # 3 layers of 2 chunks, from node-0 to node-1 and back. The end of a pass without gradients is told in a later step.
    chunks = [event for event in phases["s"] if event["name"].startswith(("kv", "grad"))]
    assert sorted(event["pid"] for event in chunks) == [0] * (6 + evaluation) + [1] * 6
    assert {(event["pid"], event["tid"]) for event in phases["X"] if event["tid"] >= LINKS} == {
        (0, LINKS + 1),
        (1, LINKS),
    }


def line(rank: int, clock: str, offset_s: float, **changes: Any) -> StepLine:
    """Rank 0 sends 8 bytes 2 s into its step, rank 1 has them a second later. Go comes to both after 1 s."""
    sent = [Sent("kv of chunk 0", 1, 8, offset_s + 2.0)] if rank == 0 else []
    taken = [] if rank == 0 else [Taken("kv of chunk 0", 0, 8, offset_s + 3.0, offset_s + 3.5)]
    spans = [
        Span("wait for Go", -1, 0, offset_s, offset_s + 1.0),
        Span("forward", -1, 0, offset_s + 1.0, offset_s + 4.0),
    ]
    values: dict[str, Any] = {
        "step": 3,
        "generation": 1,
        "rank": rank,
        "name": f"node-{rank}",
        "clock": clock,
        "began_s": offset_s,
        "ended_s": offset_s + 5.0,
        "accounts_s": {},
        "spans": spans,
        "sent": sent,
        "taken": taken,
    }
    return StepLine(**(values | changes))


def test_clocks_of_several_hosts_are_set_by_the_go() -> None:
    written = trace([line(0, "a", 50.0), line(1, "b", 9000.0)], "run")
    phases = check(written)
    assert written["otherData"]["clock"] == SEVERAL_CLOCKS
    (wire,) = (event for event in phases["X"] if event["tid"] == LINKS)
    assert (wire["ts"], wire["dur"], wire["args"]["bytes"]) == (2e6, 1e6, 8)
    assert (phases["s"][0]["ts"], phases["f"][0]["ts"]) == (2e6, 3.5e6)
    late = trace([line(0, "a", 50.0), line(1, "a", 50.5)], "run")
    (wire,) = (event for event in check(late)["X"] if event["tid"] == LINKS)
    assert (wire["ts"], wire["dur"]) == (2e6, 1.5e6), "on one clock nothing is moved"
    assert late["otherData"]["clock"] != SEVERAL_CLOCKS


def test_a_message_with_one_end_is_counted_and_not_drawn() -> None:
    alone = trace([line(1, "a", 0.0)], "run")
    assert check(alone)["s"] == []
    assert alone["otherData"]["messages without both ends"] == 1
    before = line(1, "a", 0.0, taken=[Taken("kv of chunk 0", 0, 8, 1.0, 1.5)])  # clocks that do not agree
    apart = trace([line(0, "a", 0.0), before], "run")
    assert check(apart)["s"] == []
    assert apart["otherData"]["messages without both ends"] == 2
    assert TRAINER in {event["tid"] for event in apart["traceEvents"]}


def test_a_link_carries_one_message_at_a_time() -> None:
    names = ("a", "b", "c")
    sent = [Sent(name, 1, 8, 2.0 + place / 10) for place, name in enumerate(names)]
    taken = [Taken(name, 0, 8, 3.0 + place, 6.5) for place, name in enumerate(names)]
    spans = [Span("forward", -1, 0, 0.0, 7.0)]
    nodes = [line(0, "a", 0.0, spans=spans, sent=sent), line(1, "a", 0.0, spans=spans, taken=taken)]
    events = [event for event in check(trace(nodes, "run"))["X"] if event["tid"] == LINKS]
    assert [(event["ts"], event["dur"]) for event in events] == [(2e6, 1e6), (3e6, 1e6), (4e6, 1e6)]
    assert events[2]["args"]["from_sending_to_arrival_ms"] == 2800


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    first = [line(rank, "a", 0.0) for rank in range(3)]
    again = [line(rank, "a", 60.0, generation=2) for rank in range(2)]
    for rank in range(3):
        lines = [entry for entry in (*first, *again) if entry.rank == rank]
        text = b"".join(msgspec.json.encode(entry) + b"\n" for entry in lines)
        (tmp_path / "trace" / f"node-{rank}.jsonl").write_bytes(text + b'{"step": 4, "gen')  # being written
    assert read_steps(tmp_path) == {3: again}


GOOD = msgspec.json.encode(line(0, "a", 0.0)).decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x00\xff", "line 1: not the record of a step"),
        ("[]", "line 1: not the record of a step"),
        ("[" * 100_000, "line 1: not the record of a step"),
        ('{"step": 3}', "line 1: not the record of a step"),
        (GOOD + "\n" + GOOD.replace('"step":3', '"step":"3"'), "line 2: not the record of a step"),
        (GOOD.replace('"step":3', '"step":0'), "line 1: not the record of a step"),
        (GOOD.replace('"rank":0', '"rank":-1'), "line 1: not the record of a step"),
        (GOOD.replace('"ended_s":5.0', '"ended_s":1e999'), "line 1: not the record of a step"),
        (GOOD.replace('"forward"', '"sideways"'), "line 1: spans of an unknown kind 'sideways'"),
        (GOOD.replace("1.0,4.0", "4.0,1.0"), "line 1: a span ends before it begins"),
    ],
)
def test_garbage_is_one_line(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "node-0.jsonl").write_bytes(text.encode("latin-1") + b"\n")
    assert main(["trace", str(tmp_path), "--step", "3"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"node-0.jsonl, {expected}" in said
    assert said.endswith("delete the file, and record the step again")


def test_the_command_writes_the_file_and_says_how_the_step_was_spent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(run), "--step", "5", "--out", str(tmp_path / "new" / "a.json")]) == 0
    first, second, where, how = capsys.readouterr().out.splitlines()
    assert first.startswith("node-0: ")
    assert "compute" in second
    assert where == f"trace:       {tmp_path / 'new' / 'a.json'}"
    assert "https://ui.perfetto.dev" in how
    check(json.loads((tmp_path / "new" / "a.json").read_text()))
    assert main(["trace", str(run), "--step", "4"]) == 0
    assert (run / "trace" / "step-4.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["RUN", "--step", "3"],
            "--step 3: RUN/trace has no such step, but 4 to 5; a run records it with --run.trace",
        ),
        (["TMP", "--step", "3"], "TMP/trace: no traces of a node; a run writes them with --run.trace STEPS"),
        (["TMP/none", "--step", "3"], "TMP/none/trace: no traces of a node"),
        (["RUN", "--step", "5", "--out", "TMP"], "TMP: cannot be written (Is a directory); name another file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def placed(text: str) -> str:
        return text.replace("RUN", str(run)).replace("TMP", str(tmp_path))

    assert main(["trace", *map(placed, arguments)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"isthmus trace: error: {placed(expected)}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "trace" / "node-0.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"node-0\.jsonl: cannot be read: Is a directory"):
        read_steps(tmp_path)
