"""`isthmus launch` as the files of deploy/ start it, each process a plain process of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers.deployed import DEPLOY, program, variables
from helpers.isthmus_runs import QUICK, await_end, await_records, command, environment, records, under_way

pytestmark = pytest.mark.slow

LOCAL = ["--net.profile", "unshaped", "--coordinator.join_timeout_s", "60"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        found: int = free.getsockname()[1]
        return found


def run(words: list[str], folder: Path, surroundings: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_pods_train_together(tmp_path: Path, cache: Path, port: int) -> None:
    """The Job's arguments and variables; only the config's path, the pod's name and the port are this machine's."""
    job = yaml.safe_load((DEPLOY / "kubernetes" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    args = [word.replace("/isthmus/run/run.toml", "configs/tiny.toml") for word in container["args"]]
    words = ["isthmus", *args, "--port", str(port), *LOCAL[:2]]
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert given.keys() == {entry["name"] for entry in container["env"]} - {"ISTHMUS_TOKEN"}
    with ExitStack() as stack:
        pods = []
        for index in (1, 0):  # pod 0, which serves, may come last
            surroundings = variables(tmp_path, cache, **given, JOB_COMPLETION_INDEX=str(index))
            pods.append(stack.enter_context(under_way(words, ROOT, surroundings, tmp_path / f"pod-{index}.log")))
        logs = lambda: "".join(path.read_text() for path in sorted(tmp_path.glob("pod-*.log")))  # noqa: E731
        assert [await_end(pod, 100) for pod in pods] == [0, 0], logs()
    assert "run tiny: done after 4 steps" in (tmp_path / "pod-0.log").read_text()
    assert len(records(tmp_path / "outputs" / "tiny")) == 4


@pytest.mark.timeout(300)
def test_a_pod_that_was_lost_is_started_again_and_comes_back(tmp_path: Path, cache: Path, port: int) -> None:
    """By the same command: that is all that a Job does."""
    words = ["launch", "configs/tiny.toml", "--port", str(port), *LOCAL, *QUICK, "--run.outputs", str(tmp_path)]
    words += ["--train.steps", "200", "--train.sync_every", "1", "--coordinator.heartbeat_timeout_s", "2"]
    surroundings = environment(cache, "secret") | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

    def pod(rank: int, log: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return under_way(command(*words), ROOT, surroundings | {"RANK": str(rank)}, tmp_path / log)

    def nodes() -> int:
        return len(records(tmp_path / "tiny")[-1]["nodes"])

    with pod(0, "pod-0.log") as first:
        with pod(1, "pod-1.log") as other:
            await_records(tmp_path / "tiny", 2, first, 120)
            other.kill()
        count = len(records(tmp_path / "tiny"))
        await_records(tmp_path / "tiny", count + 3, first, 60)
        assert nodes() == 1
        with pod(1, "pod-1-again.log") as again:
            assert [await_end(each, 110) for each in (first, again)] == [0, 0], (tmp_path / "pod-0.log").read_text()
        assert nodes() == 2


def test_the_script_for_slurm_trains(tmp_path: Path, cache: Path) -> None:
    """With an srun and a scontrol that do on this machine what Slurm's do on many."""
    program(tmp_path / "bin", "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames here" ] && echo localhost\n')
    program(
        tmp_path / "bin",
        "srun",
        '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=0 ] || exit 9\nshift\n'
        'SLURM_PROCID=1 "$@" & other=$!\nSLURM_PROCID=0 "$@" && wait $other\n',
    )
    job = 10_000 * 7 + os.getpid() % 10_000
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2"}
    surroundings = variables(tmp_path, cache, **slurm)
    del surroundings["ISTHMUS_TOKEN"]  # the script draws one
    script = str(DEPLOY / "slurm" / "isthmus.sbatch")
    said = run(["bash", script, "configs/tiny.toml", *LOCAL], tmp_path, surroundings)
    assert f":{20_000 + job % 10_000}" in said
    assert f"run slurm-{job}: done after 4 steps" in said


def test_skypilots_script_trains(tmp_path: Path, cache: Path) -> None:
    """Two machines of one GPU each are two torchruns here; the nodes compute on the CPU."""
    task = yaml.safe_load((DEPLOY / "skypilot" / "isthmus.yaml").read_text())
    script = task["run"].replace("--run.device cuda", "--run.device cpu --port $PORT")
    script = script.replace('export PATH="$PWD/.venv/bin:$PATH"', "")  # a checkout may have one
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(each.getsockname()[1]) for each in (one, two)]
    script = script.replace("29500", ports[0])
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    given |= task["envs"] | {"ISTHMUS_CONFIG": "configs/tiny.toml", "PORT": ports[1]}
    with ExitStack() as stack:
        machines = []
        for rank in ("0", "1"):
            surroundings = variables(tmp_path, cache, **given, SKYPILOT_NODE_RANK=rank)
            log = tmp_path / f"machine-{rank}.log"
            machines.append(stack.enter_context(under_way(["sh", "-c", script], ROOT, surroundings, log)))
        ends = [await_end(machine, 100) for machine in machines]
    assert ends == [0, 0], (tmp_path / "machine-0.log").read_text()
    assert "run tiny: done after 4 steps" in (tmp_path / "machine-0.log").read_text()


def test_a_mistake_of_the_coordinator_is_said_and_ends_rank_0(tmp_path: Path, cache: Path, port: int) -> None:
    words = command("launch", "configs/tiny.toml", "--port", str(port), "--run.outputs", tmp_path, *LOCAL)
    surroundings = environment(cache) | {"RANK": "0", "WORLD_SIZE": "1"}
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run(words, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "the coordinator did not start" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_rank_0_leaves_no_coordinator_behind(tmp_path: Path, cache: Path, port: int) -> None:
    words = ["launch", "configs/tiny.toml", "--port", port, "--run.outputs", tmp_path, "--train.steps", 2000, *LOCAL]
    surroundings = environment(cache) | {"RANK": "0", "WORLD_SIZE": "1"}
    log = tmp_path / "log"
    with under_way(command(*map(str, words)), ROOT, surroundings, log) as process:
        await_records(tmp_path / "tiny", 1, process)
        process.send_signal(signal.SIGTERM)
        assert await_end(process, 30) == 1
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))  # nobody listens there any more
