"""Every command that a document or a help text shows is one that our own parsers take, with files that exist.

Those of README.md are also run (tests/e2e/test_readme.py).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.documented import check, commands_of, fenced, made_by

from netem.errors import ConfigError
from node import epilogs

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOUND = [
    (path.relative_to(ROOT).as_posix(), command) for path in DOCUMENTS for command in commands_of(path.read_text())
]
EPILOGS = [text for name, text in vars(epilogs).items() if name.isupper() and isinstance(text, str)]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paths in commands are relative to the checkout; `run.toml` stands for a config of the user's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "run.toml").write_text((ROOT / "configs" / "tiny.toml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISTHMUS_TOKEN", "secret")


@pytest.mark.parametrize(("document", "command"), sorted(set(FOUND)))
def test_every_command_in_a_document_could_be_run(document: str, command: str) -> None:
    check(command)


def test_commands_are_found() -> None:
    documents = [document for document, _ in FOUND]
    assert documents.count("README.md") > 12
    assert documents.count("CONTRIBUTING.md") > 6
    assert documents.count("docs/results.md") > 8
    assert documents.count("docs/netem/planner.md") == documents.count("docs/netem/tunnel.md") - 1 == 1
    assert documents.count("docs/study/control.md") == 2


@pytest.mark.parametrize(
    "command",
    [
        "isthmus run configs/none.toml",
        "isthmus run configs/tiny.toml --train.stepz 4",
        "isthmus study no-such-study",
        "isthmus net verify --profile no-such-profile",
        "isthmus net set --coordinator outputs/tiny --rat 5",
        "pytest tests/unit/no_such_test.py",
        "pytest tests/unit/test_imports.py -k nothing_has_this_name",
        "python tests/benchmarks/soak.py --hours 10",
        "python -m node.lab.no_such_module",
        "make no-such-target",
    ],
)
def test_a_command_that_could_not_be_run_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError, FileNotFoundError, ImportError, SystemExit)):
        check(command)


@pytest.mark.parametrize("target", ["demo", "figure", "bench"])
def test_what_make_runs_could_be_run(target: str) -> None:
    commands = made_by([target])
    assert commands
    for command in commands:
        check(command)


def test_commands_in_help_texts_could_be_run() -> None:
    lines = [line for text in EPILOGS for line in re.findall(r"(?<!`)(isthmus [a-z].*)", text)]
    assert len(lines) > 15
    for line in lines:
        command = re.split(r"\s{2,}|`|, | [>|] |: ", line)[0]
        if "NAME" not in command:
            check(shlex.join(shlex.split(command)))


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*DOCUMENTS, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_fenced_blocks_say_what_they_are() -> None:
    """A block of commands is marked `sh`, or no test would run it."""
    for path in DOCUMENTS:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            assert kind == "sh" or not re.search(r"^(isthmus|make|pytest|python) ", block, re.MULTILINE), path
    assert fenced("```sh\nmake demo  # minutes\n\n```\n") == ["make demo"]
