"""A console for a run that goes on when nobody reads its output any more."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class LastingConsole(Console):
    """A console on standard output. When its reader has gone (`isthmus run | head -1`), it prints nothing from then on,
    and neither does anything else in this process; rich's own console ends the process."""

    def on_broken_pipe(self) -> None:
        """Let standard output lead nowhere."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
