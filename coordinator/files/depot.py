"""The files of a run's checkpoints on this machine's disk. Every method may raise `OSError`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from coordinator.files.messages import PIECE_BYTES, About, Offer
from coordinator.records.folder import checkpoint_folder

_HEAD_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20


class Depot:
    """The checkpoints in `run_folder`. A file that is not whole yet has another name."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder

    def path(self, file: About) -> Path:
        """Where the file is, or will be."""
        return checkpoint_folder(self._run_folder, file.step) / file.name

    def offer(self, file: About) -> Offer | None:
        """An offer of the file; None where it is not here."""
        path = self.path(file)
        if not path.is_file() or not path.stat().st_size:
            return None
        return Offer(file.step, file.name, path.stat().st_size, _head(path))

    def has(self, offer: Offer) -> bool:
        """Whether the file that is offered is here already, as on a disk that both sides share."""
        return self.offer(offer) == offer

    def begin(self, offer: Offer) -> str:
        """Make room for a file. Why there is none, or nothing."""
        unfinished = self._unfinished(offer)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(unfinished.parent).free
        if offer.total_bytes > free_bytes - _SPARE_BYTES:
            return f"{free_bytes} bytes are free on the disk, and it has {offer.total_bytes}"
        unfinished.write_bytes(b"")
        return ""

    def write(self, file: About, offset: int, data: memoryview) -> None:
        """Put a piece in its place."""
        with self._unfinished(file).open("r+b") as out:
            out.seek(offset)
            out.write(data)

    def finish(self, file: About) -> None:
        """All pieces are there: give the file its name."""
        self._unfinished(file).replace(self.path(file))

    def drop(self, file: About) -> None:
        """The rest will not come."""
        self._unfinished(file).unlink(missing_ok=True)

    def read(self, file: About, offset: int) -> bytes:
        """The piece that begins at `offset`; empty behind the end."""
        with self.path(file).open("rb") as source:
            source.seek(offset)
            return source.read(PIECE_BYTES)

    def _unfinished(self, file: About) -> Path:
        path = self.path(file)
        return path.with_name(f".{path.name}.coming")


def _head(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.blake2b(source.read(_HEAD_BYTES), digest_size=16).hexdigest()
