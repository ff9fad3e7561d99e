"""What the meter says of a step: its parts add up, an evaluation is told apart, MFU and memory; and traces."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.coordinated import Coordinator, Session, make_trainer
from helpers.meters import make_meter
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import WORLDS, Loop, tiny_config

from coordinator.records.rates import exposed_layer, time_share
from node.measure.profile import StepProfiler
from node.measure.spans import ACCOUNTS, EVALUATE, SAVE, WAIT_GRADIENT, WAIT_PAYLOAD, Spans
from node.measure.trace_file import read_steps
from node.train.world import build_world
from node.worker.meter import LEAST_SHARE

PARTS = [f"{name}_s" for name in ACCOUNTS]


def wait(spans: Any, seconds: float) -> None:
    spans.clock.now_s += seconds


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_time_and_the_waiting_of_an_evaluation_are_not_exposed(tmp_path: Path) -> None:
    """A step of 1 s that waits 0.25 s, then an evaluation of 4 s that waits 3 s: 25 % of the step was exposed."""
    spans = Spans(Clock())
    meter = make_meter(spans, tmp_path)
    meter.begin(1)
    wait(spans, 0.75)
    with spans.span(WAIT_PAYLOAD, 2, 1):
        wait(spans, 0.25)
    with spans.span(EVALUATE):
        wait(spans, 1.0)
        with spans.span(WAIT_PAYLOAD, 2, 2):
            wait(spans, 3.0)
    first = meter.step_metrics()
    assert (first["step_s"], first["exposed_s"], first["evaluation_s"], first["compute_s"]) == (5, 0.25, 4, 0.75)
    assert time_share([{"nodes": {"node-0": first}}], "exposed_s") == 0.25
    with spans.span(WAIT_GRADIENT, 1, 3):
        wait(spans, 0.5)
    second = meter.step_metrics()
    assert (second["step_s"], second["exposed_s"], second["exposed_backward_s"], second["evaluation_s"]) == (
        *(0.5, 0.5, 0.5),
        0,
    )


def test_layers_that_are_waited_for_are_named_and_are_few(tmp_path: Path) -> None:
    spans = Spans(Clock())
    meter = make_meter(spans, tmp_path)
    meter.begin(1)
    for layer in range(500):
        with spans.span(WAIT_PAYLOAD, layer, 1):
            wait(spans, 3.0 if layer == 7 else 0.01)
    with spans.span(WAIT_GRADIENT, 8, 1):
        wait(spans, 1.0)
    metrics = meter.step_metrics()
    named = {key: value for key, value in metrics.items() if key.startswith("layer/")}
    assert named == pytest.approx({"layer/7/exposed_forward_s": 3.0, "layer/8/exposed_backward_s": 1.0})
    assert LEAST_SHARE * 1024 > 10, "so a record never has more of them than a message to the coordinator takes"
    assert exposed_layer([{"nodes": {"a": metrics, "b": metrics}}]) == pytest.approx((7, "forward", 3.0 / 8.99))
    assert exposed_layer([{"nodes": {"a": {"exposed_s": 1.0}}}]) is None


def test_mfu_is_of_the_time_of_training_and_only_where_a_peak_is_known(tmp_path: Path) -> None:
    spans = Spans(Clock())
    meter = make_meter(spans, tmp_path, peak_flops_per_s=1000.0, flops=lambda step: 100.0 * step)
    meter.begin(3)
    wait(spans, 2.0)
    with spans.span(SAVE):
        wait(spans, 5.0)
    with spans.span(EVALUATE):
        wait(spans, 5.0)
    metrics = meter.step_metrics()
    assert metrics["mfu"] == pytest.approx(300 / 2000)
    assert metrics["memory_peak_bytes"] >= 1e6
    assert "mfu" not in make_meter(spans, tmp_path).step_metrics()


def test_speed_and_refusals_are_of_the_step(tmp_path: Path) -> None:
    spans, refused = Spans(Clock()), [5]
    meter = make_meter(spans, tmp_path, flops=lambda step: 100.0 * step, refused=lambda: refused[0])
    meter.begin(3)
    wait(spans, 2.0)
    with spans.span(EVALUATE):
        wait(spans, 5.0)
    refused[0] = 12
    metrics = meter.step_metrics()
    assert metrics["flops_per_s"] == pytest.approx(300 / 2)
    assert metrics["refused_connections"] == 7.0
    assert "refused_connections" not in meter.step_metrics()


def test_a_trace_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trace").write_text("a file in place of the folder")
    meter = make_meter(Spans(), tmp_path, traced=range(1, 2))
    meter.begin(1)
    with caplog.at_level(logging.WARNING):
        assert meter.step_metrics()["step_s"] > 0
    (record,) = caplog.records
    assert record.getMessage().startswith("run.trace: step 1 of ")


def test_over_real_wires_the_parts_are_the_step_and_the_steps_are_the_run(tmp_path: Path) -> None:
    """Four ranks as threads over wires and inboxes, through warm start, averaging, checkpoints and evaluations."""
    config = tiny_config(train={"steps": 6, "sync_every": 2, "checkpoint_every": 2, "eval_every": 4})
    loop = Loop(config, WORLDS["4"])
    shared = Coordinator(config, WORLDS["4"], 6)
    clocks: list[Any] = [SimpleNamespace() for _ in range(4)]

    def work(rank: int, _: ThreadWire) -> None:
        members, wire = loop.members[rank], loop.wires[rank]
        spans = loop.recorders[rank]
        world = build_world(members, loop.payload, wire, Session(shared, rank), tmp_path, recorder=spans)
        meter = make_meter(spans, tmp_path, wire, members, traced=range(5, 7))
        trainer = make_trainer(config, loop.payload)
        clocks[rank].began_s = spans.clock()
        trainer.run(world, Session(shared, rank), meter)
        clocks[rank].ended_s = spans.clock()

    run_ranks(4, work)
    for said, clock in zip(shared.said, clocks, strict=True):
        steps = [metrics for metrics, _ in said.values() if metrics is not None]
        assert len(steps) == 6
        for metrics in steps:
            assert sum(metrics[part] for part in PARTS) == pytest.approx(metrics["step_s"], rel=0.01)
            assert 0 <= metrics["exposed_s"] <= metrics["step_s"]
            assert metrics["exposed_s"] == metrics["exposed_forward_s"] + metrics["exposed_backward_s"]
            assert metrics["compute_s"] > 0 < metrics["barrier_s"]
        assert sum(metrics["step_s"] for metrics in steps) <= clock.ended_s - clock.began_s
        assert [metrics["averaging_s"] > 0 for metrics in steps] == [True, True, True, True, False, True]
        assert [metrics["checkpoint_s"] > 0 for metrics in steps] == [False, True] * 3
        assert [metrics["evaluation_s"] > 0 for metrics in steps] == [True, False, False, True, False, True]
    last, first = shared.said[3][5][0], shared.said[0][5][0]
    assert last is not None
    assert first is not None
    assert last["exposed_forward_s"] > 0 == last["exposed_backward_s"], "the last node reads, and nobody reads it"
    assert first["exposed_backward_s"] > 0, "the first is read"
    assert [len(nodes) for nodes in read_steps(tmp_path).values()] == [4, 4]


def test_torchs_profiler_writes_the_steps_that_it_is_asked_for(tmp_path: Path) -> None:
    profiler = StepProfiler(frozenset({2, 3, 5}), tmp_path, rank=1)
    for step in (1, 2, 3, 4, 5):
        profiler.begin(step)
        torch.ones(2, step + 10) @ torch.ones(step + 10, 2)
    profiler.end()  # the run, or the generation, ends in a step that is profiled
    profiler.end()
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == [f"node-1-step-{step}.json" for step in (2, 3, 5)]
    for name in files:
        events = json.loads((tmp_path / "profile" / name).read_text())["traceEvents"]
        assert "aten::mm" in {event.get("name") for event in events}


def test_a_profile_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file in place of the folder")
    profiler = StepProfiler(frozenset({1}), tmp_path, rank=0)
    profiler.begin(1)
    with caplog.at_level(logging.WARNING):
        profiler.begin(2)
    assert "cannot be written" in caplog.text
