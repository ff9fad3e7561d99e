"""Compose projects, containers and their lines, for the tests in `tests/docker`. Everything waits with a limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from helpers import ROOT

TOKEN = "only-for-these-tests"
STEP_S = 60.0


def docker(*words: str, timeout_s: float = STEP_S) -> str:
    """What a docker command prints."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}"
    return done.stdout


def logs_of(container: str) -> str:
    """What a container has printed, on both streams."""
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, timeout=STEP_S)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def inside(container: str, *words: str) -> str:
    """What a command of this machine prints in a container's network namespace."""
    pid = docker("inspect", "--format", "{{.State.Pid}}", container).strip()
    done = subprocess.run(["nsenter", "-t", pid, "-n", *words], capture_output=True, text=True, timeout=STEP_S)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def shape_line(container: str, rate: str, interface: str = "eth0") -> None:
    """Give a container's interface a line of this rate, up and down, by the kernel's token bucket (tc-tbf(8)).

    What comes down is shaped where it leaves the bridge: at the other end of the container's virtual cable.
    """
    bucket = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
    inside(container, "tc", "qdisc", "replace", "dev", interface, *bucket)
    subprocess.run(["tc", "qdisc", "replace", "dev", _peer(container, interface), *bucket], check=True, timeout=STEP_S)


def _peer(container: str, interface: str) -> str:
    """The name of the other end of a container's virtual cable on this machine."""
    link = json.loads(inside(container, "ip", "-json", "link", "show", "dev", interface))[0]["link_index"]
    here = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True, timeout=STEP_S).stdout)
    return next(one["ifname"] for one in here if one["ifindex"] == link)


class Project:
    """One Compose project in a folder of its own: `docker compose` as a user types it there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.environment: dict[str, str] = {}
        self.files = [folder / "docker-compose.yml"]
        shutil.copytree(ROOT / "configs", folder / "configs")
        shutil.copy(ROOT / "docker-compose.yml", folder)

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *exc: object) -> None:
        self.compose("down", "--volumes", "--timeout", "5", token=None)

    def configure(self, text: str) -> None:
        """Write configs/test.toml, and let the project use it."""
        (self.folder / "configs" / "test.toml").write_text(text)
        self.environment["ISTHMUS_CONFIG"] = "configs/test.toml"

    def compose(self, *words: str, token: str | None = TOKEN, timeout_s: float = 3 * STEP_S) -> str:
        """What a `docker compose` command prints; `token` None is a shell in which it is not set."""
        secret = {"ISTHMUS_TOKEN": token} if token else {}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ISTHMUS_")}
        files = [word for path in self.files for word in ("--file", str(path))]
        done = subprocess.run(
            ["docker", "compose", "--project-name", self.name, *files, *words],
            cwd=self.folder,
            env=kept | self.environment | secret,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"docker compose {' '.join(words)}: {done.stderr}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """The containers of a service, ended ones too."""
        return self.compose("ps", "--all", "--quiet", service, token=None).split()

    def await_end(self, limit_s: float, services: Sequence[str] = ("coordinator", "node")) -> dict[str, int]:
        """Wait until all containers have ended; their exit codes by name."""
        deadline_s = time.monotonic() + limit_s
        while True:
            states = [state(one) for service in services for one in self.containers(service)]
            if all(one["State"]["Status"] == "exited" for one in states):
                return {one["Name"].lstrip("/"): one["State"]["ExitCode"] for one in states}
            assert time.monotonic() < deadline_s, self.compose("logs", "--tail", "20", token=None)
            time.sleep(0.5)

    def await_step(self, step: int, run: str, limit_s: float) -> None:
        """Wait until the coordinator has recorded a step."""
        deadline_s = time.monotonic() + limit_s
        while True:
            found = self.records(run)
            if found and found[-1]["step"] >= step:
                return
            assert time.monotonic() < deadline_s, self.compose("logs", "--tail", "20", token=None)
            time.sleep(0.5)

    def step_s(self, run: str, after: int) -> float:
        """The median duration of the steps after the first `after`."""
        return median(record["step_s"] for record in self.records(run) if record["step"] > after)

    def records(self, run: str) -> list[Mapping[str, Any]]:
        """What the coordinator has recorded of a run so far, whether it goes on or has ended."""
        out = self.folder / "copied"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (coordinator,) = self.containers("coordinator")
        source = f"{coordinator}:/isthmus/outputs/{run}/metrics.jsonl"
        done = subprocess.run(["docker", "cp", source, str(out)], capture_output=True, timeout=STEP_S)
        if done.returncode:
            return []
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def state(container: str) -> dict[str, Any]:
    """What `docker inspect` says of a container."""
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found
