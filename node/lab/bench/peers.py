"""The processes of the peers, from the side of their parent (`peer` is one of them)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netem.children import Child, Children
from netem.errors import IsthmusError
from netem.verify.lan import Host
from node.lab.bench.arms import PeerArm

START_S = 90.0
COMMAND_S = 300.0
PORT = 29_500
"""Where rank 0 keeps torch's store; its namespace has nothing else on it."""


class Peers:
    """All ranks of the peers."""

    def __init__(self, ranks: Sequence[Child], log_path: Path) -> None:
        self._ranks, self._log_path = ranks, log_path

    def steps_s(self, arm: PeerArm, count: int) -> list[float]:
        """The times of so many steps of an arm: of each, that of the slowest rank."""
        answers = self._ask({"do": "steps", "arm": arm, "count": count})
        return [max(times) for times in zip(*answers, strict=True)]

    def check(self, arm: PeerArm) -> dict[str, float] | str:
        """How far the arm is from one process (`peer.Peer.check`), or why it does not work."""
        answers = self._ask({"do": "check", "arm": arm})
        for answer in answers:
            if "failed" in answer:
                return str(answer["failed"])
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def _ask(self, command: dict[str, Any]) -> list[Any]:
        for rank in self._ranks:
            rank.tell(json.dumps(command).encode())
        return self.hear(COMMAND_S)

    def hear(self, timeout_s: float) -> list[Any]:
        """The next answer of every rank. Raises `IsthmusError` where one ends or is too late."""
        deadline = time.monotonic() + timeout_s
        try:
            return [json.loads(rank.hear(max(1.0, deadline - time.monotonic()))) for rank in self._ranks]
        except IsthmusError as error:
            raise IsthmusError(f"{error} (the log of all ranks is {self._log_path})") from None


@contextmanager
def peers(hosts: Sequence[Host], device: str, config_path: Path, log_path: Path, port: int = PORT) -> Iterator[Peers]:
    """A rank on each host, whose NIC is called `device`. Raises `IsthmusError` where one fails; its log says why."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": device}
    program = (sys.executable, "-m", "node.lab.bench.peer", str(config_path))
    store = f"tcp://{hosts[0].address}:{port}"
    with Children() as children:
        started = [
            children.start(
                f"rank {rank} of the peers",
                [*host.prefix, *program, str(rank), str(len(hosts)), store],
                log_path=log_path,
                environment=environment,
                talks=True,
            )
            for rank, host in enumerate(hosts)
        ]
        made = Peers(started, log_path)
        made.hear(START_S)
        yield made
