"""A user's mistakes: one line that names the mend, exit code 2, no traceback."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path

from helpers.isthmus_runs import QUICK, await_end, isthmus, started

TINY = "configs/tiny.toml"


def test_one_line_names_the_mend(cache: Path) -> None:
    """In a process as a user starts it; the mistakes themselves are in tests/unit/node/commands/test_cli.py."""
    done = isthmus(cache, "run", TINY, "--model.chunkz", "4")
    assert done.returncode == 2
    assert done.stderr == "isthmus run: error: model.chunkz = 4: unknown key; did you mean chunks?\n"


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


STRANGERS = {
    "give ISTHMUS_TOKEN": ([], "wrong"),
    "config": (["--train.lr", "1.0"], "right"),
    "this is run 'tiny'": (["--run.name", "other"], "right"),
}
"""Nodes that do not belong to a run, by what they are told."""


def test_a_node_that_does_not_belong_is_told_why(cache: Path, tmp_path: Path) -> None:
    lead = ["coordinator", TINY, *QUICK, "--run.outputs", tmp_path]
    with started(cache, tmp_path / "lead.log", *lead, token="right") as coordinator, ExitStack() as stack:
        path = tmp_path / "tiny" / "coordinator.address"
        while not (path.exists() and path.read_text().endswith("\n")):
            assert coordinator.poll() is None
            time.sleep(0.02)
        join = ["node", TINY, *QUICK, "--join", path.read_text().strip()]
        nodes = {
            expected: stack.enter_context(started(cache, tmp_path / expected, *join, *settings, token=token))
            for expected, (settings, token) in STRANGERS.items()
        }
        for expected, node in nodes.items():
            assert await_end(node, 30) == 2
            text = (tmp_path / expected).read_text()
            assert "refuses this node" in text
            assert expected in text
            assert "Traceback" not in text
