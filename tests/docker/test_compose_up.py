"""`docker compose up` as README says it, in real containers."""

import re
from pathlib import Path

import pytest
from helpers.containers import Project, docker

pytestmark = pytest.mark.timeout(1500)  # the image is built first


def test_a_run_trains_to_its_end_and_its_outputs_are_copied_out(project: Project, tmp_path: Path) -> None:
    project.environment |= {"ISTHMUS_CONFIG": "configs/tiny.toml", "ISTHMUS_NODES": "4", "ISTHMUS_RUN": "four"}
    project.compose("up", "--detach")
    assert set(project.await_end(300).values()) == {0}
    logs = project.compose("logs", "coordinator", token=None)
    assert len(re.findall(r"step \d+/120", logs)) >= 2, "the coordinator shows no progress"
    assert "four" in project.compose("ps", "--all", token=None) or project.containers("node")
    records = project.records("four")
    assert [record["step"] for record in records] == list(range(1, 121))
    assert set(records[-1]["nodes"]) == set(records[0]["nodes"])
    assert len(records[-1]["nodes"]) == 4
    assert records[-1]["loss"] < records[0]["loss"] - 1
    print(f"\nfour nodes by docker compose up: {1e3 * project.step_s('four', 20):.0f} ms a step of configs/tiny.toml")

    (coordinator,) = project.containers("coordinator")
    docker("cp", f"{coordinator}:/isthmus/outputs", str(tmp_path / "outputs"))
    assert (tmp_path / "outputs/four/config.toml").is_file()
    assert list((tmp_path / "outputs/four/checkpoint").glob("step-*/COMPLETE.json"))


def test_nodes_are_found_healthy_while_they_train(project: Project) -> None:
    project.environment |= {"ISTHMUS_CONFIG": "configs/tiny.toml", "ISTHMUS_NODES": "2", "ISTHMUS_RUN": "healthy"}
    project.compose("up", "--detach")
    project.await_step(1, "healthy", 120)
    for service in ("coordinator", "node"):
        check = project.compose("config", "--format", "json")
        assert "healthcheck" in check
        for container in project.containers(service):
            test = docker("inspect", "--format", "{{json .Config.Healthcheck.Test}}", container)
            assert "python" not in test.lower()
            command = docker("inspect", "--format", "{{index .Config.Healthcheck.Test 1}}", container).strip()
            docker("exec", container, "sh", "-c", command)


def test_without_a_token_it_says_what_is_missing(project: Project) -> None:
    project.compose("up", "--detach", "coordinator", token=None)
    codes = project.await_end(60, ["coordinator"])
    assert set(codes.values()) == {2}
    assert "ISTHMUS_TOKEN" in project.compose("logs", "coordinator", token=None)
