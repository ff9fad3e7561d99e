"""The process of a page: its socket, its secrets, and the server around the application."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import uvicorn

from coordinator.keyring import OperatorKeys
from coordinator.messages import Answer
from coordinator.operator import ask
from coordinator.records.folder import CONFIG, read_address
from coordinator.records.secret import keep_file
from netem.changes import Change
from netem.errors import ConfigError
from node.config import load_config
from node.watch.page import LINKS
from node.watch.page.access import Access, Keys, new_keys
from node.watch.page.app import Page
from node.watch.page.source import Source

log = logging.getLogger("isthmus.dashboard")

EVERYWHERE = {"0.0.0.0", "::"}
NICE = 5
"""The page gives way to the nodes where they share this machine's cores."""


class Place(NamedTuple):
    """Where a page listens."""

    host: str
    port: int

    @property
    def shown(self) -> str:
        """As in an address: "127.0.0.1:7080", "[::1]:7080"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_place(text: str) -> Place:
    """`HOST:PORT` of `--dashboard` and `--bind`. Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ConfigError(f"{text!r}: expected HOST:PORT, such as 127.0.0.1:7080")
    return Place(host, int(port))


def serve(folder: Path, place: Place, names: Sequence[str], operator: Callable[[], OperatorKeys]) -> None:
    """Serve the page of the run in `folder` until interrupted.

    `names` are further hosts under which browsers reach it; `operator` gives the key that the run's coordinator asks
    of an operator. Raises `ConfigError` where the folder holds no run, or the place cannot be bound.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: holds no run; give a folder such as outputs/demo")
    if place.host in EVERYWHERE and not names:
        raise ConfigError(
            f"{place.shown}: browsers reach this page under another name; give it with --host, such as --host 10.0.0.5"
        )
    source = Source(folder, load_config(folder / CONFIG, ["--coordinator.address=tcp://127.0.0.1:0"]))
    listener = _listen(place)
    place = place._replace(port=listener.getsockname()[1])
    keys = new_keys()
    access = Access(keys, _hosts(place, names))

    def ask_network(change: Change | None) -> Answer:
        return ask(read_address(folder), operator(), change)

    page = Page(folder, source, access, f"isthmus_{place.port}", ask_network)
    shown = place._replace(host=names[0]) if place.host in EVERYWHERE else place
    _tell(folder, shown, keys)
    os.nice(NICE)
    settings = uvicorn.Config(
        page.application(), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        (folder / LINKS).unlink(missing_ok=True)


def _listen(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((place.host, place.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"{place.shown}: cannot listen there: {error.strerror}") from None
    return listener


def _hosts(place: Place, names: Sequence[str]) -> list[str]:
    """The Host headers of this page: with the port, and without it where it is HTTP's own."""
    hosts = [place.shown, *(f"{name}:{place.port}" for name in names)]
    if place.host in ("127.0.0.1", "::1"):
        hosts.append(f"localhost:{place.port}")
    return hosts + ([host.rpartition(":")[0] for host in hosts] if place.port == 80 else [])


def _tell(folder: Path, place: Place, keys: Keys) -> None:
    """Leave the addresses where only this user finds them. The part after # never leaves the browser."""
    lines = [
        f"to look:             http://{place.shown}/#{keys.read}",
        f"to look and control: http://{place.shown}/#{keys.control}",
    ]
    keep_file(folder / LINKS, "\n".join(lines) + "\n")
    log.info("the page is at http://%s/; its addresses with their secrets are in %s", place.shown, folder / LINKS)
