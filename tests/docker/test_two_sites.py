"""Two sites: two Compose projects, each on a bridge of its own, with a router between whose lines are narrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.containers import Project, docker, inside, shape_line

SITES = {"a": "172.30.81", "b": "172.30.82"}
ROUTER = 254
NETWORK = """
networks:
  default:
    external: true
    name: {name}
"""
JOIN = """
services:
  node:
    deploy:
      replicas: 1
    depends_on: !reset []
    environment:
      COORDINATOR: {coordinator}
    command: [node, configs/tiny.toml, --join, "{coordinator}", --bind, "tcp://eth0:0", --coordinator.nodes, "2",
              --net.profile, unshaped, --run.name, sites]
"""


@pytest.fixture
def sites(image: str, tmp_path: Path) -> Iterator[tuple[Project, Project]]:
    """Both projects and the router, which forwards between the sites' networks."""
    with ExitStack() as stack:
        for name, prefix in SITES.items():
            network = f"isthmus-test-{name}"
            docker("network", "create", "--subnet", f"{prefix}.0/24", network)
            stack.callback(docker, "network", "rm", network)
        router = docker(
            *("run", "--detach", "--rm", "--network", "isthmus-test-a", "--ip", f"{SITES['a']}.{ROUTER}"),
            *("--sysctl", "net.ipv4.ip_forward=1", "--entrypoint", "sleep", image, "1200"),
        ).strip()
        stack.callback(docker, "rm", "--force", router)
        docker("network", "connect", "--ip", f"{SITES['b']}.{ROUTER}", "isthmus-test-b", router)
        for interface in ("eth0", "eth1"):
            shape_line(router, "300mbit", interface)
        projects = []
        for name in SITES:
            project = stack.enter_context(Project(tmp_path / name, f"isthmus-test-{name}"))
            (project.folder / "network.yml").write_text(NETWORK.format(name=f"isthmus-test-{name}"))
            project.files.append(project.folder / "network.yml")
            project.environment |= {"ISTHMUS_CONFIG": "configs/tiny.toml", "ISTHMUS_PROFILE": "unshaped"}
            project.environment |= {"ISTHMUS_NODES": "2", "ISTHMUS_RUN": "sites"}
            projects.append(project)
        yield projects[0], projects[1]


def route(container: str, site: str, other: str) -> None:
    """Let a container of one site reach the other one through the router."""
    inside(container, "ip", "route", "replace", f"{SITES[other]}.0/24", "via", f"{SITES[site]}.{ROUTER}")


@pytest.mark.timeout(1500)
def test_two_sites_train_through_a_router(sites: tuple[Project, Project]) -> None:
    here, there = sites
    here.compose("up", "--detach", "coordinator")
    (coordinator,) = here.containers("coordinator")
    address = docker(
        "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", coordinator
    ).strip()
    route(coordinator, "a", "b")
    for project, site, other in ((here, "a", "b"), (there, "b", "a")):
        (project.folder / "join.yml").write_text(JOIN.format(coordinator=f"tcp://{address}:7070"))
        project.files.append(project.folder / "join.yml")
        project.compose("up", "--detach", "--no-deps", "node")
        for container in project.containers("node"):
            route(container, site, other)
    assert set(here.await_end(300, ["coordinator", "node"]).values()) == {0}
    assert set(there.await_end(60, ["node"]).values()) == {0}
    records = here.records("sites")
    assert records[-1]["step"] == 120
    assert len(records[-1]["nodes"]) == 2
    print(f"\ntwo sites, 300 Mbit/s: {1e3 * here.step_s('sites', 20):.0f} ms a step of configs/tiny.toml")
