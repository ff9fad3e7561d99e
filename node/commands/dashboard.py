"""`isthmus dashboard`: the live page of a run. Other commands start it as a child for `--dashboard`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from netem.children import Child, Children
from netem.errors import ConfigError, RunAborted
from node.commands.change import keys_of
from node.commands.node import interrupt
from node.watch.page import LINKS

log = logging.getLogger("isthmus.dashboard")

START_S = 20.0
EXTRA = "isthmus[web]"


class PageWish(NamedTuple):
    """What `--dashboard` asks for: where the page is served, and under which further names browsers reach it."""

    bind: str
    names: tuple[str, ...] = ()


def dashboard(folder: Path, bind: str, names: Sequence[str]) -> None:
    """Serve the page until Ctrl-C."""
    try:
        from node.watch.page.serve import parse_place, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"the page needs {error.name}: pip install '{EXTRA}'") from None

    signal.signal(signal.SIGTERM, interrupt)  # uvicorn raises it again at its end; the links are to go then too
    serve(folder, parse_place(bind), names, lambda: keys_of(str(folder), None))


def start_page(
    children: Children, folder: Path, wish: PageWish, log_path: Path | None, environment: Mapping[str, str]
) -> Child:
    """Start the page of the run in `folder` as a child, wait until it listens, and say where it is.

    The addresses with their secrets are shown on a terminal only; elsewhere the file that holds them is named. Raises
    `ConfigError` where the page cannot be served.
    """
    (folder / LINKS).unlink(missing_ok=True)
    hosts = [word for name in wish.names for word in ("--host", name)]
    command = [sys.executable, "-m", "node.cli", "dashboard", str(folder), "--bind", wish.bind, *hosts]
    child = children.start("dashboard", command, log_path=log_path, environment=environment)
    deadline_s = monotonic() + START_S
    while not (folder / LINKS).exists():
        if child.wait(0.05):
            raise ConfigError(f"--dashboard {wish.bind}: {child.reason() or child.describe()}")
        if monotonic() > deadline_s:
            raise RunAborted(f"the page did not start within {START_S:g} s; its log is {log_path}")
    if sys.stderr.isatty():
        log.info("the run's page:\n%s", (folder / LINKS).read_text(encoding="ascii").rstrip())
    else:
        log.info("the run's page is at %s; its addresses with their secrets are in %s", wish.bind, folder / LINKS)
    return child
