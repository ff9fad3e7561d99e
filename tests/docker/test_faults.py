"""What a run in containers survives: nodes that are killed, frozen or cut off.

`docs/reliability.md` says what it promises. Run with -s to see how long the others stood still.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from helpers.containers import Project, docker, logs_of

NODES = 3
CONFIG = """
[model]
layers = 2
d_model = 32
heads = 2
kv_heads = 2
ffn_dim = 64
context = 96
chunks = 6
[compress]
mode = "dense"
[train]
steps = 400
batch = 2
sync_every = 1
eval_every = 0
[data]
tokenizer = "bytes"
[coordinator]
nodes = 3
heartbeat_interval_s = 0.5
heartbeat_timeout_s = 4.0
"""
WELL_UNDER_WAY = 20
STILL_S = 40.0
"""The others go on within this time: two heartbeat timeouts and a step, on a machine that has other work."""


@pytest.fixture
def training(project: Project) -> Project:
    """A run of three nodes that has done some steps."""
    project.configure(CONFIG)
    project.environment |= {"ISTHMUS_NODES": str(NODES), "ISTHMUS_PROFILE": "unshaped", "ISTHMUS_RUN": "faults"}
    project.compose("up", "--detach")
    project.await_step(WELL_UNDER_WAY, "faults", 200)
    return project


def go_on(project: Project, what: str, before: Mapping[str, Any] | None = None) -> int:
    """Wait until further steps have been done in a later generation than that of a record, or now; the generation."""
    before = before or project.records("faults")[-1]
    began_s = time.monotonic()
    while True:
        last = project.records("faults")[-1]
        if last["generation"] > before["generation"] and last["step"] > before["step"]:
            print(f"\n{what}: training went on after {time.monotonic() - began_s:.1f} s")
            return int(last["generation"])
        assert time.monotonic() - began_s < STILL_S, project.compose("logs", "--tail", "30", token=None)
        time.sleep(0.25)


@pytest.mark.timeout(1500)
def test_the_others_go_on_when_a_node_is_killed(training: Project) -> None:
    victim = training.containers("node")[-1]
    docker("kill", victim)
    go_on(training, "docker kill")
    codes = training.await_end(300)
    assert sorted(codes.values()) == [0, 0, 0, 137]
    records = training.records("faults")
    assert [record["step"] for record in records] == list(range(1, 401))
    assert len(records[-1]["nodes"]) == NODES - 1


@pytest.mark.timeout(1500)
def test_a_frozen_node_is_left_behind_and_says_so_when_it_wakes(training: Project) -> None:
    victim = training.containers("node")[-1]
    docker("pause", victim)
    go_on(training, "docker pause")
    docker("unpause", victim)
    training.await_end(300)
    assert training.records("faults")[-1]["step"] == 400
    assert "the others go on without this node" in logs_of(victim)


@pytest.mark.timeout(1500)
def test_a_node_that_is_cut_off_is_left_behind(training: Project) -> None:
    victim = training.containers("node")[-1]
    network = f"{training.name}_default"
    docker("network", "disconnect", network, victim)
    go_on(training, "docker network disconnect")
    for container in training.containers("node")[:-1] + training.containers("coordinator"):
        assert docker("inspect", "--format", "{{.State.Running}}", container).strip() == "true"
    docker("kill", victim)
    codes = training.await_end(300)
    assert sorted(codes.values()) == [0, 0, 0, 137]


@pytest.mark.timeout(1500)
def test_a_coordinator_that_is_killed_and_started_again_goes_on_with_its_nodes(training: Project) -> None:
    (coordinator,) = training.containers("coordinator")
    before = training.records("faults")[-1]
    docker("kill", coordinator)
    docker("start", coordinator)
    go_on(training, "docker kill and start of the coordinator", before)
    assert set(training.await_end(300).values()) == {0}
    records = training.records("faults")
    assert [record["step"] for record in records] == list(range(1, 401))
    assert len(records[-1]["nodes"]) == NODES
    assert "an earlier coordinator was lost" in logs_of(coordinator)
