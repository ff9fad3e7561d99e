"""Writes the page or the figures of a command: whole, or not at all."""

from __future__ import annotations

from pathlib import Path

from coordinator.records.folder import whole_file
from netem.errors import ConfigError


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file and the folders above it. Raises `ConfigError`, which names `option`, where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another with {option}") from None
