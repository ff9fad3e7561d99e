"""`isthmus`, and `python -m node`: the entry point, which answers Ctrl-C also while the rest is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> int:
    """Run the command that the process was given; its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    from node.cli import main as run_command

    return run_command()


def interrupt(number: int, frame: FrameType | None) -> None:
    """End at once in the middle of an import, where an exception may be turned into another one, or be lost.

    A command that has started something which must be ended handles SIGTERM, and is interrupted as usual.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and _is_importing(frame):
        os.write(2, b"isthmus: interrupted\n")
        os._exit(INTERRUPTED)
    signal.default_int_handler(number, frame)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    sys.exit(main())
