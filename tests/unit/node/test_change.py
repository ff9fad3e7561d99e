"""`isthmus net set`: where it takes the run's address and its secret from."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.messages import Answer
from coordinator.records.folder import ADDRESS
from coordinator.records.secret import keep_secret
from node.cli import main

AT = "tcp://127.0.0.1:5"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Address and token of each question; the run is in `tmp_path`."""
    found: list[tuple[str, str]] = []

    def ask(address: str, token: str, change: object) -> Answer:
        found.append((address, token))
        return Answer(step=1, at_s=0.5, network="home", past=[], coming=[], confirmed=["node-0"], silent=[])

    monkeypatch.setattr("node.commands.change.ask", ask)
    monkeypatch.delenv("ISTHMUS_TOKEN", raising=False)
    (tmp_path / ADDRESS).write_text(AT + "\n")
    return found


def test_the_secret_of_a_run_is_found_in_its_folder(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    keep_secret(tmp_path, "drawn")
    assert main(["net", "set", "--coordinator", str(tmp_path), "--rate", "50 Mbit/s"]) == 0
    assert asked == [(AT, "drawn")]


def test_the_runs_own_secret_goes_before_the_environments_and_an_option_before_both(
    asked: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["net", "show", "--coordinator"]
    monkeypatch.setenv("ISTHMUS_TOKEN", "exported")
    main([*where, str(tmp_path)])
    keep_secret(tmp_path, "drawn")
    main([*where, str(tmp_path)])
    main([*where, str(tmp_path), "--token", "given"])
    main([*where, AT])
    assert [token for _, token in asked] == ["exported", "drawn", "given", "exported"]
