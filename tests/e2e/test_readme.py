"""README's commands, as they stand there, run by a shell in the order of the README.

They run in a copy of configs/ whose tiny.toml is smaller, so that they take seconds. `PARSED` names the commands that
are not run, with the reason: our own parsers check them in tests/unit/test_documented_commands.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.documented import fenced
from helpers.isthmus_runs import await_end, await_records, environment, records, under_way

from coordinator.records.secret import SECRET

README = fenced((ROOT / "README.md").read_text())
PARSED = {
    "make": "trains for minutes, or runs all tests, this one among them; both install Isthmus first",
    "isthmus study": "trains for a third of an hour",
    "isthmus net verify": "measures for minutes",
    "isthmus coordinator": "waits for other machines at an address that this one does not have",
    "isthmus node": "joins a coordinator at such an address",
    "export ISTHMUS_TOKEN": "belongs to the two before",
}
"""Beginnings of commands that are parsed and not run, with the reason."""
RUN = [command for command in README if not command.startswith(tuple(PARSED))]

LIVE = (
    *("isthmus run configs/tiny.toml", "isthmus net set", "isthmus watch"),
    "isthmus run configs/tiny.toml --run.resume",
)
"""A run, what changes its network meanwhile, what shows it, and what continues it after an interruption."""
TO_THE_END = (
    *("isthmus eval", "isthmus run configs/tiny.toml --compress.mode dense", "isthmus report", "isthmus export"),
    *("isthmus generate", "isthmus plan", "isthmus settings"),
)

LONG, SHORT = 2000, 6
"""Steps of a run that is interrupted, and of one that is waited for."""


class Workshop:
    """A folder with a copy of configs/, and a shell that finds `isthmus` there."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "configs", folder / "configs")
        program = folder / "bin" / "isthmus"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m node "$@"\n')
        program.chmod(0o755)
        paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.variables = environment(cache) | paths

    def shrink(self, steps: int, nodes: int = 2) -> None:
        """Make configs/tiny.toml smaller: its context, its latency, its data."""
        path = self.folder / "configs" / "tiny.toml"
        text = (ROOT / "configs" / "tiny.toml").read_text()
        for key, lines in (
            ("context", "context = 64"),
            ("warmup_steps", "warmup_steps = 2"),
            ("steps", f"steps = {steps}\ncheckpoint_every = 2\neval_batches = 2"),
            ("sync_every", "sync_every = 2"),
            ("tokenizer", 'tokenizer = "bytes"\nmax_tokens = 40_000'),
            ("nodes", f"nodes = {nodes}"),
            ("profile", 'profile = "internet-300mbps"\nlatency = "1 ms"'),
        ):
            text, count = re.subn(rf"^{key} = .*$", lines, text, flags=re.MULTILINE)
            assert count == 1, key
        path.write_text(text)

    def run(self, command: str, code: int = 0) -> str:
        """Run a command to its end, with this exit code; what it printed."""
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        return done.stderr if code else done.stdout

    def going_on(self, command: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """A command that goes on meanwhile."""
        return under_way(["sh", "-c", f"exec {command}"], self.folder, self.variables, self.folder / "log")


@pytest.fixture
def workshop(tmp_path: Path, cache: Path) -> Workshop:
    return Workshop(tmp_path, cache)


def named(beginning: str) -> str:
    """The command of README that is this, or else the one that begins so."""
    found = [command for command in RUN if command.startswith(beginning)]
    assert beginning in found or len(found) == 1, (beginning, found)
    return beginning if beginning in found else found[0]


def test_every_command_is_run_or_said_not_to_be() -> None:
    assert sorted(RUN) == sorted(named(beginning) for beginning in (*LIVE, *TO_THE_END))
    assert all(any(command.startswith(beginning) for command in README) for beginning in PARSED)


@pytest.mark.timeout(300)  # a dozen processes, one after the other
def test_the_commands_do_what_the_readme_says(workshop: Workshop) -> None:
    run, change, watch, resume = map(named, LIVE)
    tiny = workshop.folder / "outputs" / "tiny"
    workshop.shrink(LONG)
    with workshop.going_on(run) as process:
        await_records(tiny, 4, process)
        assert stat.S_IMODE((tiny / SECRET).stat().st_mode) == 0o600  # the command finds the run's token there
        assert "rate 50 Mbit/s everywhere" in workshop.run(change)
        process.send_signal(signal.SIGINT)
        await_end(process, 30)
    assert "no coordinator serves" in workshop.run(watch, code=1)
    assert not (tiny / SECRET).exists()
    before = len(records(tiny))
    with workshop.going_on(resume) as process:
        await_records(tiny, before + 1, process)
        process.send_signal(signal.SIGINT)
        await_end(process, 30)

    evaluate, dense, report, export, generate, plan, settings = map(named, TO_THE_END)
    assert "held-out loss" in workshop.run(evaluate)
    workshop.shrink(SHORT, nodes=1)
    workshop.run(dense)
    workshop.run(report)
    assert (workshop.folder / "two.png").read_bytes().startswith(b"\x89PNG")
    workshop.run(export)
    assert (workshop.folder / "dense-hf" / "model.safetensors").exists()
    assert workshop.run(generate).startswith("It was a")
    assert "tokens/s" in workshop.run(plan)
    assert "--preset" in workshop.run(settings)


@pytest.mark.slow
def test_a_compressed_run_is_exported_after_the_command_that_the_refusal_gives(workshop: Workshop) -> None:
    """What `make demo` makes still compresses, so `export` refuses it; its message holds a command that mends that."""
    workshop.shrink(SHORT)
    workshop.run("isthmus run configs/tiny.toml")
    refusal = workshop.run("isthmus export outputs/tiny tiny-hf", code=2)
    found = re.search(r"isthmus run .*", refusal)
    assert found is not None, refusal
    workshop.run(found[0])
    workshop.run("isthmus export outputs/tiny tiny-hf")
    assert (workshop.folder / "tiny-hf" / "model.safetensors").exists()
