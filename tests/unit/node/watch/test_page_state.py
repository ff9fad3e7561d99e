"""What the live page shows: bounded, true to the records, and whole after a resumed run's repeats."""

import json
from typing import Any

import pytest

from node.config import Config, load_config
from node.watch.page import series
from node.watch.page.series import Series
from node.watch.page.state import MOST_EVALUATIONS, PARTS, PageState


@pytest.fixture
def config() -> Config:
    return load_config(
        None,
        ["--coordinator.nodes=2", "--net.profile=internet-300mbps", "--train.steps=50", "--compress.warmup_steps=5"],
    )


def record(step: int, **more: Any) -> dict[str, Any]:
    """A step of one second, of which node-1 spends half on waiting in the forward pass."""
    parts = dict.fromkeys(PARTS, 0.0)
    nodes = {
        "node-0": {**parts, "step_s": 1.0, "compute_s": 1.0, "sent_wire_bytes": 1e6, "link/node-1/promised_s": 0.25},
        "node-1": {**parts, "step_s": 1.0, "compute_s": 0.5, "exposed_forward_s": 0.5, "sent_wire_bytes": 0.0},
    }
    return {
        "step": step,
        "time": 100.0 + step,
        "generation": 1,
        "loss": 1.0 / step,
        "step_s": 1.0,
        "nodes": nodes,
    } | more


def test_the_figures_are_those_of_the_records(config: Config) -> None:
    state = PageState(config)
    for step in range(1, 4):
        state.feed(record(step, tokens=1000.0))
    found = state.overview()
    assert found["header"]["step"] == 3
    assert found["header"]["steps"] == 50
    assert found["header"]["eta_s"] == pytest.approx(47.0)
    assert found["header"]["tokens_per_s"] == pytest.approx(1000.0)
    assert found["series"]["loss"] == pytest.approx([1, 1 / 2, 1 / 3])
    waits = {node["name"]: node["parts_s"]["exposed_forward"] for node in found["nodes"]}
    assert waits == {"node-0": 0.0, "node-1": 0.5}
    (link,) = found["links"]
    assert (link["source"], link["target"], link["busy"]) == ("node-0", "node-1", 0.25)
    assert link["rate_bps"] == pytest.approx(300e6)
    json.dumps(found, allow_nan=False)  # no infinity or NaN gets into it


def test_before_the_first_record_the_page_has_the_nodes_of_the_config(config: Config) -> None:
    found = PageState(config).overview()
    assert [node["name"] for node in found["nodes"]] == ["node-0", "node-1"]
    assert not any(node["there"] for node in found["nodes"])
    json.dumps(found, allow_nan=False)


def test_news_has_only_what_came_since(config: Config) -> None:
    state = PageState(config)
    for step in range(1, 6):
        state.feed(record(step, **({"heldout_loss": 2.0} if step in (2, 4) else {})))
    news = state.news(3)
    assert [point["step"] for point in news["points"]] == [4, 5]
    assert news["heldout"] == [(4, 2.0)]
    assert not news["reload"]
    assert state.news(5)["points"] == []


def test_steps_done_again_replace_those_before_and_make_pages_reload(config: Config) -> None:
    state = PageState(config)
    change = [{"at_s": 1.0, "change": "all cut"}]
    for step in range(1, 11):
        state.feed(record(step, heldout_loss=float(step), network=change))
    state.feed(record(6, loss=7.0))
    found = state.overview()
    assert found["series"]["step"] == [1, 2, 3, 4, 5, 6]
    assert found["series"]["loss"][-1] == 7.0
    assert [step for step, _ in found["heldout"]] == [1, 2, 3, 4, 5]
    assert [mark["step"] for mark in found["marks"]] == [1, 2, 3, 4, 5]
    assert state.news(10)["reload"]


def test_energy_is_kept_by_layer_and_evaluation(config: Config) -> None:
    state = PageState(config)
    state.feed(record(1, layer0_k_energy_kept=0.5, layer11_v_energy_kept=0.75, layer0_k_stable_rank=3.0))
    assert state.overview()["energy"] == [(1, {"0k": 0.5, "11v": 0.75})]


def test_what_is_not_finite_is_not_shown(config: Config) -> None:
    state = PageState(config)
    state.feed(record(1, loss=None, heldout_loss=None))
    assert state.overview()["header"]["loss"] is None
    json.dumps(state.overview(), allow_nan=False)


def test_a_long_run_stays_small(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST_POINTS", 100)
    state = PageState(config)
    steps = 5 * MOST_EVALUATIONS
    for step in range(1, steps + 1):
        state.feed({"step": step, "time": float(step), "loss": 1.0, "heldout_loss": 1.0, "nodes": {}})
    found = state.overview()
    assert 50 <= len(found["series"]["step"]) <= 101
    assert found["series"]["step"][-1] == steps
    assert len(found["heldout"]) == MOST_EVALUATIONS


def test_points_become_means_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST_POINTS", 4)
    columns = Series(["x"])
    for step, value in enumerate([1.0, 3.0, None, 5.0, 7.0, 9.0, 11.0], start=1):
        columns.add(step, [value])
    # Four points became two, of which each later one takes two records; the last record waits for its fellow.
    assert columns.columns() == {"step": [2.0, 4.0, 6.0, 7.0], "x": [2.0, 5.0, 8.0, 11.0]}


def test_refusals_add_up_and_only_faults_count_as_such(config: Config) -> None:
    state = PageState(config)
    told = [{"step": 1, "kind": kind, "reason": kind} for kind in ("slow", "recovered", "joined", "lost")]
    state.feed(record(1, refused_connections=3.0, faults=told))
    state.feed(record(2, refused_connections=4.0, refused_requests=1.0))
    header = state.overview()["header"]
    assert (header["refused_connections"], header["refused_requests"], header["faults"]) == (7, 1, 2)
