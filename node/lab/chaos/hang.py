"""How `isthmus chaos` makes a node hang: its trainer stands still while its heartbeats go on.

Python runs signal handlers on the main thread, which is the one that trains. So a handler that sleeps holds up that
thread alone; it leaves the interpreter to the threads that move messages and send heartbeats. Nodes listen to these
signals only where `chaos` has started them.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

VARIABLE = "ISTHMUS_CHAOS"
"""The environment variable that tells a node to listen."""
HANG, GO_ON = signal.SIGUSR1, signal.SIGUSR2
POLL_S = 0.05

_hangs = False


def listen() -> None:
    """Hang from now on whenever the signal `HANG` comes, until `GO_ON` comes; only where the variable is set."""
    if os.environ.get(VARIABLE):
        signal.signal(HANG, _hang)
        signal.signal(GO_ON, _go_on)


def _hang(number: int, frame: FrameType | None) -> None:
    global _hangs
    _hangs = True
    while _hangs:
        time.sleep(POLL_S)


def _go_on(number: int, frame: FrameType | None) -> None:
    global _hangs
    _hangs = False
