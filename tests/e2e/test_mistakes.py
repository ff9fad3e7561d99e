"""A user's mistakes: one line that names the mend, exit code 2, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from helpers.isthmus_runs import QUICK, await_end, isthmus, started

TINY = "configs/tiny.toml"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "configs/none.toml"], "configs/none.toml: no such file"),
        (["run", TINY, "--model.chunkz", "4"], "did you mean chunks?"),
        (["run", TINY, "--model.layers", "two"], 'model.layers = "two": expected a whole number'),
        (["run", TINY, "--model.chunks", "3"], "does not divide"),
        (["run", TINY, "--model.context", "4000000", "--model.chunks", "4"], "needs 4000001"),
        (["run", TINY, "--coordinator.nodes", "9"], "more nodes than chunks"),
        (["run", TINY, "--net.profile", "dial-up"], "no such profile"),
        (["run", TINY, "--data.corpus", "no/such.txt"], "no/such.txt"),
        (["run", TINY, "--run.resume", "true", "--run.name", "never-ran"], "no complete checkpoint"),
        (["eval", "outputs/never-ran"], "no such folder"),
        (["report", "outputs/never-ran"], "outputs/never-ran"),
    ],
)
def test_one_line_names_the_mend(cache: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    extra = ["--run.outputs", str(tmp_path)] if arguments[0] == "run" else []
    done = isthmus(cache, *arguments, *extra)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(cache: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = isthmus(cache, "run", TINY, *QUICK, "--run.outputs", tmp_path, "--coordinator.address", address)
    assert done.returncode == 2, done.stderr
    assert address in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_coordinator_is_named(cache: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        done = isthmus(cache, "node", TINY, *QUICK, "--coordinator.join_timeout_s", "2", "--join", address)
    assert done.returncode == 2, done.stderr
    assert address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "token", "expected"),
    [
        ([], "wrong", "token"),
        (["--train.lr", "1.0"], "right", "config"),
        (["--run.name", "other"], "right", "this is run 'tiny'"),
    ],
)
def test_a_node_that_does_not_belong_is_told_why(
    cache: Path, tmp_path: Path, arguments: list[str], token: str, expected: str
) -> None:
    lead = ["coordinator", TINY, *QUICK, "--run.outputs", tmp_path]
    with started(cache, tmp_path / "lead.log", *lead, token="right") as coordinator:
        path = tmp_path / "tiny" / "coordinator.address"
        while not (path.exists() and path.read_text().endswith("\n")):
            assert coordinator.poll() is None
        join = ["node", TINY, *QUICK, *arguments, "--join", path.read_text().strip()]
        with started(cache, tmp_path / "node.log", *join, token=token) as node:
            assert await_end(node, 30) == 2
    text = (tmp_path / "node.log").read_text()
    assert "refuses this node" in text
    assert expected in text
    assert "Traceback" not in text
