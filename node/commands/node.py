"""`isthmus node`: one worker, which joins a coordinator and trains until the run ends."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from coordinator.keyring import invitation
from coordinator.layout import check_stages
from coordinator.messages import COORDINATOR, NODE_NAME
from netem.errors import ConfigError, RunAborted
from netem.sockets import check_host, parse_address
from node.config import Config
from node.lab.chaos.hang import listen

if TYPE_CHECKING:
    from node.worker.arrival import Shortfall


def run_node(config: Config, join: str, bind: str, advertise: str, name: str, rank: int) -> None:
    """Join the run at `join` and take part in it. Raises `RunAborted` where it ends before its last step."""
    check_stages(config.coordinator.layout)
    if not join.startswith("tcp://"):
        raise ConfigError(f"--join {join!r}: expected the coordinator's address, such as tcp://10.0.0.5:7070")
    check_host(parse_address(join, "--join", dial=True), f"--join {join}")
    guest = invitation(config.coordinator)
    name = name or (guest.name if guest else default_name(rank))
    if not re.fullmatch(NODE_NAME, name) or name == COORDINATOR:
        raise ConfigError(
            f"--name {name!r}: expected 1 to 64 letters, digits, '_', '.' and '-', the first a letter or a digit, "
            f"and not {COORDINATOR!r}"
        )
    # A thread that spins while it waits takes its core from the node's network, and from other nodes of the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from node.worker.node import Place, run_node  # torch takes seconds to import: a mistyped option should not

    signal.signal(signal.SIGTERM, interrupt)
    listen()
    try:
        run_node(config, Place(join, bind, advertise, name, rank), _shortfall(config))
    except KeyboardInterrupt:
        raise RunAborted("interrupted") from None


def _shortfall(config: Config) -> Shortfall:
    """What says whether this node's GPU has memory for more chunks, as the planner counts it."""
    import torch

    from node.lab.plan.memory import shortfall
    from node.worker.arrival import ENOUGH

    device = torch.device(config.run.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return ENOUGH
    return partial(shortfall, config, torch.cuda.get_device_properties(device).total_memory)


def default_name(rank: int) -> str:
    """A name for a node without one: made of its rank, or else of its host and random digits.

    The process id would not be unique: in containers on one host it is 1 for all nodes.
    """
    if rank >= 0:
        return f"node-{rank}"
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())
    return f"node-{host[:40]}-{secrets.token_hex(3)}"


def interrupt(number: int, _frame: FrameType | None) -> None:
    """A signal handler: SIGTERM ends a process as Ctrl-C does. A second one must not disturb the ending."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
