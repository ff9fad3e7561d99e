"""Where the tests in containers get their engine: `make test-docker` sets one up (`engine.sh`)."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.containers import Project, docker

BUILD_S = 1200


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    if "ISTHMUS_TEST_DOCKER" not in os.environ:
        pytest.skip(
            "needs a Docker engine with Compose, and root: `make test-docker` sets one up and starts these tests"
        )
    for words in (["info"], ["compose", "version"]):
        found = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=30)
        if found.returncode:
            pytest.skip(f"docker {' '.join(words)}: {(found.stderr or found.stdout).strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def image(_engine: None) -> str:
    """The image, built from the Dockerfile as it stands."""
    done = subprocess.run(
        ["docker", "compose", "build", "node"], cwd=ROOT, timeout=BUILD_S, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return "isthmus"


@pytest.fixture
def project(image: str, tmp_path: Path) -> Iterator[Project]:
    """A Compose project of its own, with copies of the compose file and the configs; nothing of it is left behind."""
    with Project(tmp_path / "project", "isthmus-test") as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def _clean(_engine: None) -> Iterator[None]:
    yield
    for network in docker("network", "ls", "--format", "{{.Name}}").split():
        if network.startswith("isthmus-test"):
            docker("network", "rm", network)
