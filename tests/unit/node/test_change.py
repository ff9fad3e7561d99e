"""`isthmus net set`: where it takes the run's address and the operator's key from."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.keyring import OPERATOR_FILE, OperatorKeys, as_text, make_keys, operator_pair, read_keys
from coordinator.messages import COORDINATOR, Answer
from coordinator.records.folder import ADDRESS
from coordinator.records.secret import keep_secret
from netem.keys import derived_pair, new_pair
from node.cli import main

AT = "tcp://127.0.0.1:5"
Asked = list[tuple[str, OperatorKeys]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Address and keys of each question; the run is in `tmp_path`."""
    found: Asked = []

    def ask(address: str, keys: OperatorKeys, change: object) -> Answer:
        found.append((address, keys))
        return Answer(step=1, at_s=0.5, network="home", past=[], coming=[], confirmed=["node-0"], silent=[])

    monkeypatch.setattr("node.commands.change.ask", ask)
    monkeypatch.delenv("ISTHMUS_TOKEN", raising=False)
    monkeypatch.delenv("ISTHMUS_OPERATOR", raising=False)
    (tmp_path / ADDRESS).write_text(AT + "\n")
    return found


def drawn(folder: Path) -> OperatorKeys:
    keys = OperatorKeys(coordinator=new_pair().public, secret=new_pair().secret)
    keep_secret(folder, as_text(keys))
    return keys


def test_the_key_of_a_run_is_found_in_its_folder(asked: Asked, tmp_path: Path) -> None:
    keys = drawn(tmp_path)
    assert main(["net", "set", "--coordinator", str(tmp_path), "--rate", "50 Mbit/s"]) == 0
    assert asked == [(AT, keys)]


def test_the_runs_own_key_goes_before_the_environments_and_an_option_before_both(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["net", "show", "--coordinator"]
    monkeypatch.setenv("ISTHMUS_TOKEN", "token")
    monkeypatch.setenv("ISTHMUS_OPERATOR", "boss")
    exported = OperatorKeys(coordinator=derived_pair("token", COORDINATOR).public, secret=operator_pair("boss").secret)
    main([*where, str(tmp_path)])
    own = drawn(tmp_path)
    main([*where, str(tmp_path)])
    make_keys(tmp_path / "keys", ["a"])
    file = tmp_path / "keys" / OPERATOR_FILE
    main([*where, str(tmp_path), "--key", str(file)])
    main([*where, AT])
    assert [keys for _, keys in asked] == [exported, own, read_keys(OperatorKeys, file, ""), exported]


def test_without_a_key_nothing_is_asked(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["net", "show", "--coordinator", AT]) == 2
    assert "the operator's secret is missing" in capsys.readouterr().err
    assert asked == []
