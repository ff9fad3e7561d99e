"""The command line in this process."""

from __future__ import annotations

import pytest

from helpers import ROOT
from node.cli import main

TINY = str(ROOT / "configs" / "tiny.toml")


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the mistake gets."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    prefix = f"isthmus {arguments[0]}: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)
