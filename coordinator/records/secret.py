"""The operator's key of a run, beside the run's address, for later commands of the same user.

A coordinator that is given no secret for its operator draws a key. The user who started it may change the network
(`isthmus net set`), and that command finds the key here: in a file that only its owner can read, which is there while
the run goes on. A secret that the user chose is never written to disk, since it may serve elsewhere too.
"""

from __future__ import annotations

import os
from pathlib import Path

SECRET = "operator.key"


def keep_secret(folder: Path, text: str) -> None:
    """Write the key's text, readable by its owner only."""
    keep_file(folder / SECRET, text)


def keep_file(path: Path, text: str) -> None:
    """Write a secret, readable by its owner only. A file system that cannot keep it so gets none."""
    path.unlink(missing_ok=True)  # an earlier run's; and whatever else is there under this name is not written through
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        private = not os.fstat(descriptor).st_mode & 0o077
        if private:
            file.write(text)
    if not private:
        path.unlink()


def drop_secret(folder: Path) -> None:
    """Remove the key: the run is over."""
    (folder / SECRET).unlink(missing_ok=True)


def secret_path(folder: Path) -> Path | None:
    """The file with the key of the run that goes on in `folder`; None where none is kept."""
    path = folder / SECRET
    return path if path.is_file() else None
