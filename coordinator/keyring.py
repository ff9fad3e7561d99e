"""The keys of a run: derived from its token, or read from the files that `isthmus keys` makes.

With a token, everyone who has it can compute the coordinator's key pair, and may join. With files, the coordinator's
secret stays with it, and each node has an invitation of its own: a key that may join under one name. The operator, who
may change the run's network, has another key in either case.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from coordinator.config import CoordinatorConfig, is_loopback
from coordinator.messages import COORDINATOR, NODE_NAME
from netem.config import Section, convert, dump_toml, load_toml, user_path
from netem.errors import ConfigError
from netem.keys import Access, KeyPair, derived_pair, new_pair, pair_of
from netem.names import KeyText
from netem.sockets import parse_address

COORDINATOR_FILE, OPERATOR_FILE = "coordinator.toml", "operator.toml"

_Name = Annotated[str, msgspec.Meta(pattern=NODE_NAME)]


class CoordinatorKeys(Section, frozen=True, kw_only=True):
    """The coordinator's secret key, and the public keys of those that it lets in."""

    secret: KeyText
    operator: KeyText
    nodes: dict[_Name, KeyText]


class Invitation(Section, frozen=True, kw_only=True):
    """One node's secret key, the name under which it joins, and the coordinator's public key."""

    coordinator: KeyText
    name: _Name
    secret: KeyText


class OperatorKeys(Section, frozen=True, kw_only=True):
    """The operator's secret key, and the coordinator's public key."""

    coordinator: KeyText
    secret: KeyText


KeysT = TypeVar("KeysT", CoordinatorKeys, Invitation, OperatorKeys)


def read_keys(cls: type[KeysT], path: Path, key: str) -> KeysT:
    """The keys in a file. Raises `ConfigError`, which names the setting or option `key`, and never a secret."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"{key} = {str(path)!r}: cannot be read: {error.strerror}; isthmus keys makes such files"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"{key} = {str(path)!r}: other users can read it; chmod 600 {path}")
    tree = load_toml(path)
    try:
        return convert(cls, tree)
    except ConfigError:  # its text would show values
        raise ConfigError(f"{key} = {str(path)!r}: expected the {_KINDS[cls]}, as isthmus keys makes it") from None


_KINDS: Mapping[type[Section], str] = {
    CoordinatorKeys: "coordinator's keys",
    Invitation: "invitation of a node",
    OperatorKeys: "operator's key",
}


def as_text(keys: Section) -> str:
    """The text of a key file."""
    tree = msgspec.to_builtins(keys)
    assert isinstance(tree, dict)
    return dump_toml(tree)


def make_keys(folder: Path, names: list[str]) -> list[Path]:
    """Write the keys of a run into a new or empty folder: a file each for coordinator, operator and nodes.

    Only their owner can read them. Raises `ConfigError`.
    """
    lead, operator = new_pair(), new_pair()
    guests = {name: new_pair() for name in names}
    own = CoordinatorKeys(
        secret=lead.secret, operator=operator.public, nodes={name: pair.public for name, pair in guests.items()}
    )
    files: dict[str, Section] = {
        COORDINATOR_FILE: own,
        OPERATOR_FILE: OperatorKeys(coordinator=lead.public, secret=operator.secret),
    }
    for name, pair in guests.items():
        files[f"{name}.toml"] = Invitation(coordinator=lead.public, name=name, secret=pair.secret)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty; give a new folder, so that no key is overwritten")
        for name, keys in files.items():
            _write_private(folder / name, as_text(keys))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None
    return [folder / name for name in files]


def coordinator_keys(config: CoordinatorConfig) -> tuple[KeyPair, CoordinatorKeys | None]:
    """The coordinator's key pair, and what its file says if it has one. Raises `ConfigError`."""
    if config.keys:
        keys = read_keys(CoordinatorKeys, user_path(config.keys, "coordinator.keys"), "coordinator.keys")
        return pair_of(keys.secret), keys
    return derived_pair(config.token, COORDINATOR), None


def invitation(config: CoordinatorConfig) -> Invitation | None:
    """This node's invitation, if the settings name one. Raises `ConfigError`."""
    if not config.keys:
        return None
    return read_keys(Invitation, user_path(config.keys, "coordinator.keys"), "coordinator.keys")


def node_access(config: CoordinatorConfig, bind: str) -> tuple[Access, str]:
    """How a node that listens at `bind` proves itself to the coordinator and the members; the coordinator's public key.

    Raises `ConfigError`.
    """
    guest = invitation(config)
    pair = pair_of(guest.secret) if guest else new_pair()
    lead = guest.coordinator if guest else derived_pair(config.token, COORDINATOR).public
    return Access(pair, encrypts(config, bind)), lead


def encrypts(config: CoordinatorConfig, bind: str) -> bool:
    """Whether callers of a node that listens at `bind` speak CURVE."""
    return config.encryption == "always" or (
        config.encryption == "auto" and not is_loopback(parse_address(bind, "--bind"))
    )


def operator_pair(secret: str) -> KeyPair:
    """The key pair of an operator who has this secret."""
    return derived_pair(secret, "operator")


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
