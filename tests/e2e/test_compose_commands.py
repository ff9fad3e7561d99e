"""The commands of docker-compose.yml, as plain processes on this machine: no Docker engine is needed to see them work.

Only what names the container network is replaced: the interface eth0 by the loopback, the host name by 127.0.0.1.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import yaml
from helpers.isthmus_runs import QUICK, ROOT, await_end, await_records, started

SETTINGS = {"ISTHMUS_CONFIG": "configs/tiny.toml", "ISTHMUS_NODES": "2", "ISTHMUS_RUN": "composed"}


def compose_command(service: str, port: int) -> list[str]:
    """A service's command with its variables filled in, as Compose does it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    words = []
    for word in services[service]["command"]:
        filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: SETTINGS.get(match[1], match[2]), str(word))
        filled = filled.replace("//eth0:", "//127.0.0.1:").replace("//coordinator:", "//127.0.0.1:")
        words.append(filled.replace(":7070", f":{port}"))
    return words


def test_the_services_train_together(tmp_path: Path, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    extra = [*QUICK, "--run.outputs", str(tmp_path)]
    lead, near, far = (compose_command(service, port) + extra for service in ("coordinator", "node", "remote-node"))
    with (
        started(cache, tmp_path / "lead.log", *lead, token="secret") as coordinator,
        started(cache, tmp_path / "one.log", *near, "--name", "one", token="secret") as one,
        started(cache, tmp_path / "two.log", *far, "--name", "two", token="secret") as two,
    ):
        await_records(tmp_path / "composed", 6, coordinator)
        assert [await_end(process, 30) for process in (coordinator, one, two)] == [0, 0, 0], (
            tmp_path / "lead.log"
        ).read_text()
