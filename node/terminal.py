"""Standard output and error as users have them: in any encoding, and read by a program that may stop (`head`)."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
import unicodedata

_PLAIN = {
    "×": "x",
    "·": "*",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+-",
    "√": "sqrt ",
    "∞": "infinity",
    "θ": "theta",
    "ψ": "psi",
    "µ": "u",
    "μ": "u",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}


def make_readable() -> None:
    """Let both streams write what their encoding lacks in letters that it has: × as x, … as three dots."""
    codecs.register_error("isthmus-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="isthmus-plain")


def reader_has_gone() -> bool:
    """Whether nobody reads standard output any more. If so, what is still printed is dropped in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # or the interpreter's last flush fails, and says so
    os.close(nowhere)
    return True


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter) or _without_accent(letter) for letter in letters), error.end


def _without_accent(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
