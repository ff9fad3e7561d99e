"""The secret of a run that made its own, beside the run's address, for later commands of the same user.

`isthmus run` draws a token for each run that is given none. The user who started it may also change its network
(`isthmus net set`), and that command finds the token here: in a file that only its owner can read, which is there while
the run goes on. A token that the user chose is never written to disk, since it may serve elsewhere too.
"""

from __future__ import annotations

import os
from pathlib import Path

SECRET = "coordinator.token"


def keep_secret(folder: Path, token: str) -> None:
    """Write the token, readable by its owner only."""
    keep_file(folder / SECRET, token + "\n")


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
    """Remove the token: the run is over."""
    (folder / SECRET).unlink(missing_ok=True)


def read_secret(folder: Path) -> str | None:
    """The token of the run that goes on in `folder`; None where none is kept, or it is another user's."""
    try:
        return (folder / SECRET).read_text().strip() or None
    except OSError:
        return None
