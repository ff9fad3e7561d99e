"""`isthmus doctor`: the machines that want to train together examine each other and the ways between them.

One is started with --listen, as the coordinator of the run will be, and is examined too; the others with --join.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from coordinator.keyring import encrypts, invitation, node_access
from coordinator.messages import COORDINATOR, NODE_NAME
from coordinator.survey.messages import MOST_GUESTS, Verdict
from coordinator.survey.serve import Attendance, HostServer, attend
from netem.errors import ConfigError
from netem.keys import Access, new_pair
from netem.sockets import advertised, check_host, parse_address
from node.commands.launch import address_towards
from node.config import Config
from node.lab.doctor.facts import facts_of
from node.lab.doctor.page import judge

WRONG = 1
"""The exit code where something is wrong."""

MOST_WAIT_S = 1e6


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, beside the config."""

    has_config: bool
    listen: str
    nodes: int | None
    join: str
    bind: str
    advertise: str
    name: str
    wait_s: float
    out: Path | None


def doctor(load: Callable[[list[str]], Config], wish: Wish) -> int:
    """Take part in the survey, and print its result: 0 where nothing is wrong, else `WRONG`.

    `load` reads the config with these settings added. Raises `ConfigError` for a mistake, and `IsthmusError` where the
    survey ends before its result.
    """
    if bool(wish.listen) == bool(wish.join):
        raise ConfigError("doctor: give --listen tcp://INTERFACE:PORT on one machine, and --join ADDRESS on the others")
    if wish.out is not None and not wish.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {wish.out}: there is no folder {wish.out.absolute().parent}")
    if wish.join:
        config = load([])
        access, lead = node_access(config.coordinator, _bind(wish, wish.join))
        verdict = attend(_attendance(config, wish, wish.join, access, lead), _tell)
    else:
        verdict = _host(_for_all(load([f"--coordinator.address={wish.listen}"]), wish), wish)
    print(printable(verdict.text))
    if wish.out is not None and verdict.profile:
        wish.out.write_text(verdict.profile, encoding="utf-8")
    return WRONG if verdict.wrong else 0


def _host(config: Config, wish: Wish) -> Verdict:
    """Serve the survey, and take part in it."""
    if not 2 <= config.coordinator.nodes <= MOST_GUESTS:
        raise ConfigError(f"--nodes: give the number of machines, this one among them: 2 to {MOST_GUESTS}")
    if not 0 < wish.wait_s < MOST_WAIT_S:
        raise ConfigError(f"--wait {wish.wait_s:g}: expected more than 0 and less than {MOST_WAIT_S:g} seconds")
    pair = new_pair()
    judged = partial(judge, config=config if wish.has_config else None)
    server = HostServer(config.coordinator, config.run.name, wish.wait_s, (_name(config, wish), pair.public), judged)
    with server:
        _tell(f"waiting for {config.coordinator.nodes} machines at {server.address}")
        access = Access(pair, encrypts(config.coordinator, _bind(wish, server.address)))
        return attend(_attendance(config, wish, server.address, access, server.key), _tell)


def _for_all(config: Config, wish: Wish) -> Config:
    """The config for as many machines as are expected. Whether they can train it, the result says."""
    nodes = config.coordinator.nodes if wish.nodes is None else wish.nodes
    return msgspec.structs.replace(config, coordinator=msgspec.structs.replace(config.coordinator, nodes=nodes))


def _bind(wish: Wish, join: str) -> str:
    """Where this machine listens: on the interface that leads to the host, if nothing else is said."""
    host = parse_address(join, "--join", dial=True)
    check_host(host, f"--join {join}")
    return wish.bind or f"tcp://{address_towards(host, int(join.rpartition(':')[2]), '--join')}:0"


def _name(config: Config, wish: Wish) -> str:
    guest = invitation(config.coordinator) if wish.join else None
    name = wish.name or (guest.name if guest else re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64])
    if not re.fullmatch(NODE_NAME, name) or name == COORDINATOR:
        raise ConfigError(
            f"--name {name!r}: expected 1 to 64 letters, digits, '_', '.' and '-', and not {COORDINATOR!r}"
        )
    return name


def _attendance(config: Config, wish: Wish, join: str, access: Access, lead: str) -> Attendance:
    bind = _bind(wish, join)
    return Attendance(
        join=join,
        bind=bind,
        advertise=partial(advertised, place=wish.advertise),
        name=_name(config, wish),
        config_digest=_digest(config) if wish.has_config else "",
        facts=facts_of(config, parse_address(bind, "--bind")),
        access=access,
        lead=lead,
    )


def _digest(config: Config) -> str:
    """What must be equal on all machines. Their number may be given to one of them only."""
    same = msgspec.structs.replace(config.coordinator, nodes=1, min_nodes=1)
    return msgspec.structs.replace(config, coordinator=same).digest()


def printable(text: str) -> str:
    """The text without what could steer a terminal: parts of it come from other machines."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
