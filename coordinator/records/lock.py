"""Locks of a run's folder: at most one process starts or serves a run at a time.

The coordinator holds `SERVING` for its life. `isthmus run`, which writes the config before it starts a coordinator,
holds `STARTING` for its own life. The operating system frees a lock when its process ends, however it ends, so a crash
leaves nothing to clean up. The lock files stay behind; an unlocked file means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from netem.errors import ConfigError

SERVING = ".coordinator.lock"
STARTING = ".run.lock"


@contextmanager
def locked(run_folder: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of an existing run folder. Raises `ConfigError` where another process holds it."""
    lock = FileLock(run_folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{run_folder}: another process is running this run now; wait until it has ended, or stop it first"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise ConfigError(f"{run_folder / name}: cannot be locked ({error}); set run.outputs to a local disk") from None
    try:
        yield
    finally:
        lock.release()


def check_unlocked(run_folder: Path) -> None:
    """Raise `ConfigError` where a coordinator serves this run now. A folder that does not exist is not locked."""
    if run_folder.is_dir():
        with locked(run_folder, SERVING):
            pass


def is_locked(run_folder: Path) -> bool:
    """Whether a coordinator serves this run now, as far as its lock tells: one on another machine may not be seen. No
    file is made, so that the folder may be readable only."""
    path = run_folder / SERVING
    if not path.exists():
        return False
    try:
        check_unlocked(run_folder)
    except ConfigError:
        return True
    return False
