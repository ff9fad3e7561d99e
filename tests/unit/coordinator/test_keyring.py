"""The files of `isthmus keys`: what is in them, who can read them, and what a wrong one is told."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.doorkeeper import Doorkeeper
from coordinator.keyring import CoordinatorKeys, Invitation, OperatorKeys, make_keys, node_access, read_keys
from coordinator.messages import PROTOCOL_VERSION, Ask, Heartbeat, Join, NodeMessage
from netem.endpoint import unique
from netem.errors import ConfigError
from netem.keys import KeyPair, new_pair, pair_of
from node.cli import main

LOCAL = "tcp://127.0.0.1:0"


def join(name: str, pair: KeyPair) -> Join:
    return Join(
        name=name, key=pair.public, version=PROTOCOL_VERSION, run="run", config_digest="", address="tcp://127.0.0.1:1"
    )


def refusal(door: Doorkeeper, name: str, pair: KeyPair, message: NodeMessage) -> str | None:
    return door.refusal(unique(name, pair.public), message)


def test_every_file_is_its_owners_alone_and_they_fit_together(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths = make_keys(tmp_path / "keys", ["node-0", "home"])
    finally:
        os.umask(before)
    assert [path.name for path in paths] == ["coordinator.toml", "operator.toml", "node-0.toml", "home.toml"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    lead = read_keys(CoordinatorKeys, paths[0], "")
    operator = read_keys(OperatorKeys, paths[1], "")
    guest = read_keys(Invitation, paths[3], "")
    assert {guest.coordinator, operator.coordinator} == {pair_of(lead.secret).public}
    assert lead.operator == pair_of(operator.secret).public
    assert lead.nodes == {
        name: pair_of(read_keys(Invitation, path, "").secret).public
        for name, path in (("node-0", paths[2]), ("home", paths[3]))
    }
    with pytest.raises(ConfigError, match="is not empty"):
        make_keys(tmp_path / "keys", ["other"])


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (None, 0o600, "cannot be read: No such file or directory; isthmus keys makes such files"),
        ("", 0o644, "other users can read it; chmod 600"),
        ("secret = 'abc'", 0o600, "expected the operator's key, as isthmus keys makes it"),
        ("coordinator = 'S3CRET'\nsecret = 'S3CRET'", 0o600, "expected the operator's key"),
        ("x", 0o600, "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it_and_shows_no_secret(
    tmp_path: Path, text: str | None, mode: int, says: str
) -> None:
    path = tmp_path / "operator.toml"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=says) as caught:
        read_keys(OperatorKeys, path, "--key")
    assert str(path) in str(caught.value)
    assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("encryption", "bind", "encrypts"),
    [
        ("auto", LOCAL, False),
        ("auto", "tcp://[::1]:0", False),
        ("auto", "tcp://lo:0", False),
        ("auto", "tcp://eth0:0", True),
        ("auto", "tcp://10.0.0.5:7070", True),
        ("never", "tcp://eth0:0", False),
        ("always", LOCAL, True),
    ],
)
def test_what_is_encrypted_follows_where_a_node_listens(encryption: Any, bind: str, encrypts: bool) -> None:
    access, lead = node_access(CoordinatorConfig(token="t", encryption=encryption), bind)
    assert access.encrypts == encrypts
    assert access.invited == frozenset()
    assert lead == Doorkeeper(CoordinatorConfig(token="t"), "run").access.pair.public


def test_with_a_token_all_may_knock_and_only_the_operator_may_change_the_network() -> None:
    door = Doorkeeper(CoordinatorConfig(token="t", operator="boss"), "run")
    assert door.access.invited is None
    assert door.operator_file is None, "a secret that a person chose is not written to disk"
    pair = new_pair()
    assert refusal(door, "node-0", pair, join("node-0", pair)) is None
    assert refusal(door, "node-0", pair, Heartbeat()) is None
    assert "did not come with the key" in str(refusal(door, "node-0", pair, join("node-0", new_pair())))
    ask = Ask(version=PROTOCOL_VERSION)
    assert "operator's secret" in str(refusal(door, "(operator)", pair, ask))


def test_a_coordinator_draws_a_key_for_its_operator_if_it_is_given_none(tmp_path: Path) -> None:
    door = Doorkeeper(CoordinatorConfig(), "run")
    path = tmp_path / "operator.key"
    path.touch(0o600)
    path.write_text(str(door.operator_file))
    keys = read_keys(OperatorKeys, path, "")
    assert keys.coordinator == door.access.pair.public
    assert refusal(door, "(operator)", pair_of(keys.secret), Ask(version=PROTOCOL_VERSION)) is None


def test_with_keys_each_joins_under_the_name_of_its_invitation(tmp_path: Path) -> None:
    paths = make_keys(tmp_path / "keys", ["node-0", "node-1"])
    door = Doorkeeper(CoordinatorConfig(keys=str(paths[0])), "run")
    guest = pair_of(read_keys(Invitation, paths[2], "").secret)
    operator = pair_of(read_keys(OperatorKeys, paths[1], "").secret)
    assert door.access.invited is not None
    assert {guest.public, operator.public} < door.access.invited
    assert refusal(door, "node-0", guest, join("node-0", guest)) is None
    assert "not for the name node-1" in str(refusal(door, "node-1", guest, join("node-1", guest)))
    assert "not for the name operator" in str(refusal(door, "operator", operator, join("operator", operator)))
    assert refusal(door, "(operator)", operator, Ask(version=PROTOCOL_VERSION)) is None
    assert "operator's secret" in str(refusal(door, "(operator)", guest, Ask(version=PROTOCOL_VERSION)))


def test_the_command_makes_them_and_says_what_each_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--nodes", "1", "--name", "home"]) == 0
    out = capsys.readouterr().out
    assert f"{folder / 'node-0.toml'}: for one node" in out
    assert f"{folder / 'operator.toml'}: for you" in out
    for path in folder.iterdir():
        secret = path.read_text().partition('secret = "')[2].partition('"')[0]
        assert len(secret) == 40
        assert secret not in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "each node needs an invitation"),
        (["--nodes", "-1"], "--nodes -1: expected 0 to 4096"),
        (["--name", "a b"], "--name 'a b'"),
        (["--name", "operator"], "--name 'operator'"),
        (["--nodes", "1", "--name", "node-0"], "--name 'node-0'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["keys", str(tmp_path / "keys"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()
