"""The machines stay free of I/O, the floor stays below the node floor, and nothing unpickles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import coordinator

FOLDER = Path(coordinator.__file__).parent
MACHINES = ("assignment", "barrier", "events", "member", "membership", "messages", "ring", "rounds", "run")
NO_IO = {"asyncio", "os", "queue", "random", "select", "socket", "threading", "time", "zmq"}
NEVER = {"node", "pickle", "torch"}


def imported(module: str) -> set[str]:
    names: set[str] = set()
    for entry in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Import):
            names |= {alias.name for alias in entry.names}
        elif isinstance(entry, ast.ImportFrom):
            names.add(entry.module or "")
    return names


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_imports(module: str) -> None:
    names = imported(module)
    roots = {name.partition(".")[0] for name in names}
    assert not roots & NEVER
    if module in MACHINES:
        assert not roots & NO_IO
        assert "netem.endpoint" not in names
