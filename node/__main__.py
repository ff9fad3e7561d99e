"""`isthmus`, and `python -m node`: the entry point, which imports the rest where Ctrl-C is already expected."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command that the process was given; its exit code."""
    try:
        from node.cli import main as run_command

        return run_command()
    except KeyboardInterrupt:
        print("isthmus: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
