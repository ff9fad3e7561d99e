"""`isthmus node`: one worker, which joins a coordinator and trains until the run ends."""

from __future__ import annotations

import signal
import socket
from types import FrameType

from netem.errors import ConfigError, RunAborted
from node.config import Config


def run_node(config: Config, join: str, bind: str, advertise: str, name: str, rank: int) -> None:
    """Join the run at `join` and take part in it. Raises `RunAborted` where it ends before its last step."""
    from node.worker import Place, run_node  # torch takes seconds to import: a mistyped option should not

    if not join.startswith("tcp://"):
        raise ConfigError(f"--join {join!r}: expected the coordinator's address, such as tcp://10.0.0.5:7070")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_node(config, Place(join, bind, advertise, name or default_name(rank), rank))
    except KeyboardInterrupt:
        raise RunAborted("interrupted") from None


def default_name(rank: int) -> str:
    """A name for a node that was given none: its rank, or its host."""
    return f"node-{rank}" if rank >= 0 else f"node-{socket.gethostname()}"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
