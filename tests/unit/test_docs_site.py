"""The documentation site: what its pages say of messages, and the pages from the code. `tests/e2e` builds it."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
from helpers import ROOT

from netem.config import describe
from node.config import Config
from node.options import parser

DOCS = ROOT / "docs"
PAGES = (DOCS / "guide" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGES, re.MULTILINE)


def source() -> str:
    """All of our code, with texts that go over several lines put together."""
    files = sorted(path for room in ("netem", "coordinator", "node") for path in (ROOT / room).rglob("*.py"))
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"[\"']\n\s*f?[\"']", "", text)


SOURCE = source()


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    path = DOCS / "reference_pages.py"
    spec = importlib.util.spec_from_file_location("reference_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_pages"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_that_the_code_says(message: str) -> None:
    for part in message.split("…"):
        assert part.strip() in SOURCE, part


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 10
    assert "this is no message of ours" not in SOURCE


def test_every_setting_and_every_command_has_its_place(pages: ModuleType) -> None:
    settings, commands = pages.settings_page(), pages.commands_page()
    for key in describe(Config):
        assert f"\n``{key.path}``\n" in settings
    assert "``home``" in settings
    for name in ("run", "launch", "watch", "generate", "net cut"):
        assert f"\nisthmus {name}\n---" in commands
    assert parser().format_help().splitlines()[0][:20] in commands


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = re.findall(r"^[\w/*-]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or name in listed or f"{name.rpartition('/')[0]}/*" in listed, name
