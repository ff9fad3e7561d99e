"""The house rules about imports: state machines have no I/O, clock or chance; floors import downwards only."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

IMPURE = {
    *("zmq", "asyncio", "torch", "time", "random", "threading", "socket", "select", "selectors", "secrets"),
    *("os", "queue"),
}
PURE_MODULES = [
    "netem.units",
    "netem.bucket",
    "netem.segments",
    "netem.frames",
    "netem.link",
    "netem.shaper",
    "netem.delay",
    "netem.ingress",
    "netem.lane",
    "netem.network",
    "netem.changes",
    "netem.schedule",
    "netem.peers",
    "netem.door",
    "netem.assembly",
    "netem.profile",
    "netem.limits",
    "netem.counters",
    "netem.config",
    "netem.errors",
    "netem.names",
    "netem.tables",
    "netem.verify.promise",
    "coordinator.assignment",
    "coordinator.barrier",
    "coordinator.events",
    "coordinator.layout",
    "coordinator.live",
    "coordinator.member",
    "coordinator.membership",
    "coordinator.messages",
    "coordinator.phase",
    "coordinator.plan",
    "coordinator.restart",
    "coordinator.ring",
    "coordinator.rounds",
    "coordinator.run",
    "coordinator.saves",
    "coordinator.state",
    "coordinator.table",
    "node.exchange.transfer_tags",
    "node.train.transfer",
]
BELOW = {"netem": set(), "coordinator": {"netem"}, "node": {"coordinator", "netem"}}

PARTS = ("data", "measure", "subspace", "exchange", "model", "site", "train", "worker")
"""The rooms of a node, whose parts take their sections of the config."""
KNOW_THE_TREE = {"train/from_config.py", "train/trainer.py", "train/resume.py", "worker/node.py"}
"""Those that make parts from the whole tree, or compare trees."""


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function, by its full name."""
    found = set()
    for tree in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(tree, ast.Import):
            found |= {alias.name for alias in tree.names}
        elif isinstance(tree, ast.ImportFrom):
            assert tree.level == 0, f"{path}: relative import"
            found |= {str(tree.module)} | {f"{tree.module}.{alias.name}" for alias in tree.names}
    return found


def path_of(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_state_machine_imports_nothing_impure(module: str) -> None:
    """Directly, or through a module of ours that it imports."""
    seen, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for found in imports_of(path_of(name)):
            assert found.split(".")[0] not in IMPURE, f"{module} imports {found} through {name}"
            if found.split(".")[0] in BELOW and path_of(found).is_file() and found not in seen:
                waiting.add(found)


@pytest.mark.parametrize("floor", BELOW)
def test_floors_import_downwards_only(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        for found in imports_of(path):
            top = found.split(".")[0]
            assert top not in BELOW or top == floor or top in BELOW[floor], f"{path}: {found}"


def test_only_the_sockets_room_speaks_zmq() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in (ROOT / "netem").rglob("*.py") if "zmq" in imports_of(path)}
    assert users == {"netem/sockets.py", "netem/porter.py", "netem/keys.py"}


def test_nothing_unpickles_and_only_nodes_know_torch() -> None:
    for floor in BELOW:
        for path in (ROOT / floor).rglob("*.py"):
            roots = {found.split(".")[0] for found in imports_of(path)}
            assert "pickle" not in roots, path
            assert floor == "node" or "torch" not in roots, path


def test_parts_take_their_sections_of_the_config_and_not_the_tree() -> None:
    users = set()
    for room in PARTS:
        for path in (ROOT / "node" / room).rglob("*.py"):
            if imports_of(path) & {"node.config.Config", "node.config.tree", "node.config.tree.Config"}:
                users.add(path.relative_to(ROOT / "node").as_posix())
    assert users == KNOW_THE_TREE


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for folder in (*BELOW, "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
