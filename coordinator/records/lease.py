"""A run's lease: a second coordinator of one run is refused, also on another machine that shares the run's folder.

The folder's lock (`coordinator.records.lock`) tells two processes of one machine apart, and the system frees it when
its holder dies. On a shared disk it may mean nothing to another machine. So the holder also counts up in a small file,
and whoever finds the file of another machine watches it for `HOLD_S` before taking it over: clocks are not compared. A
holder that finds another name in the file, because it was cut off from the disk or asleep for long, has lost the run
and ends.

The file has a fixed size and is written in place, so a full disk does not cost the lease.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from netem.errors import ConfigError

log = logging.getLogger("isthmus.coordinator")

LEASE = "coordinator.lease"

HOLD_S = 10.0
"""A lease that was not counted up for so long is free."""

_RENEWALS = 5
"""How often it is counted up in that time."""

_FILE_BYTES = 512


class Entry(NamedTuple):
    """What the file says: who holds the run, and how often that was confirmed."""

    holder: str
    host: str
    pid: int
    beats: int


class Lease:
    """The lease of the run in `folder`, which this process holds from `take` on. `host` is this machine's name."""

    def __init__(self, folder: Path, host: str = "", hold_s: float = HOLD_S) -> None:
        self._path = folder / LEASE
        self._hold_s = hold_s
        self._lock = threading.Lock()
        self._lost = ""  # why, once it is
        self._on_lost: Callable[[str], None] | None = None
        self._own = Entry(secrets.token_hex(8), host or socket.gethostname(), os.getpid(), 0)

    def take(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Take the lease. Raises `ConfigError` where a coordinator on another machine counts it up, `OSError` where the
        disk fails.

        The caller holds the folder's lock, so no other process of this machine has the lease.
        """
        found = read_lease(self._path)
        if found is not None and found.host != self._own.host:
            log.info("%s is of %s (pid %d): seeing whether it lives", self._path, found.host, found.pid)
            self._watch(found, sleep)
        self._write()
        sleep(self._hold_s / _RENEWALS if found is not None and found.host != self._own.host else 0.0)
        if not self.renew():  # two machines have taken it at once, and the other one was later
            raise self._refusal(read_lease(self._path))

    def renew(self) -> bool:
        """Count up; False where the lease is another's now. A disk that fails is waited for."""
        try:
            found = read_lease(self._path)
            if found is not None and found.holder != self._own.holder:
                return False
            self._own = self._own._replace(beats=self._own.beats + 1)
            self._write()
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._path, error)
        return True

    def drop(self) -> None:
        """Give the lease back, if it is still this process's."""
        with suppress(OSError):
            found = read_lease(self._path)
            if found is not None and found.holder == self._own.holder:
                self._path.unlink(missing_ok=True)

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called once with the reason if the lease is lost, on any thread, or at once if it is already."""
        with self._lock:
            self._on_lost = tell
            lost = self._lost
        if lost:
            tell(lost)

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """Take the lease as `take` does, count up on a thread of its own meanwhile, and give it back."""
        self.take()
        over = threading.Event()
        thread = threading.Thread(target=self._keep, args=(over,), name="lease", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            self.drop()

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(self._hold_s / _RENEWALS):
            if not self.renew():
                reason = str(self._refusal(read_lease(self._path)))
                with self._lock:
                    self._lost, tell = reason, self._on_lost
                if tell is not None:
                    tell(reason)
                return

    def _watch(self, found: Entry, sleep: Callable[[float], None]) -> None:
        """See for `hold_s` whether another machine's lease is counted up."""
        for _ in range(2 * _RENEWALS):
            sleep(self._hold_s / (2 * _RENEWALS))
            now = read_lease(self._path)
            if now is not None and now != found:
                raise self._refusal(now)

    def _refusal(self, found: Entry | None) -> ConfigError:
        who = f"a coordinator on {found.host} (pid {found.pid})" if found else "another coordinator"
        return ConfigError(f"{self._path}: {who} serves this run; stop it first, or wait until it has ended")

    def _write(self) -> None:
        """In place, so that no reader finds an empty file and no room is needed but once."""
        text = json.dumps(self._own._asdict()).encode().ljust(_FILE_BYTES - 1) + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, text, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lease(path: Path) -> Entry | None:
    """What the file says; None where there is none, or it says nothing that can be understood. Raises `OSError`."""
    try:
        said = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    wanted = {"holder": str, "host": str, "pid": int, "beats": int}
    if not isinstance(said, dict) or said.keys() != wanted.keys():
        return None
    return Entry(**said) if all(type(said[key]) is kind for key, kind in wanted.items()) else None
