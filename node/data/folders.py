"""The files of a corpus: one file, or those of a folder to any depth, with a reason for each that is left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from netem.errors import ConfigError
from node.config.data import KNOWN_CORPORA
from node.data.packed import PACKED_SUFFIXES, plain_suffixes

TEXT_SUFFIX = ".txt"
PARQUET_SUFFIX = ".parquet"
ROWS_SUFFIXES = (".jsonl", ".ndjson")
# Packed only: a plain .json file in a folder of data is most often a description of the data.
PACKED_ROWS_SUFFIX = ".json"
KINDS = f"expected .txt or .jsonl (both also {', '.join(PACKED_SUFFIXES)}), .json.gz or .parquet"
_NOT_CORPUS = ("license", "licence", "copying", "notice", "readme")
"""Names of text files that come with a corpus and are no part of it."""
_MOST_NAMED = 20


class Found(NamedTuple):
    """`files` are read, in this order. `left_out` holds paths below the root, each with the reason."""

    root: Path
    files: list[Path]
    left_out: list[tuple[Path, str]]

    def lines(self) -> list[str]:
        """What is read and what is left out of a folder, for the log; nothing for a file that is named itself."""
        if self.files == [self.root]:
            return []
        read = [f"reads {len(self.files)} files: {_names([str(path.relative_to(self.root)) for path in self.files])}"]
        if not self.left_out:
            return read
        reasons = [f"{path} ({reason})" for path, reason in self.left_out]
        return [*read, f"leaves out {len(reasons)}: {_names(reasons)}"]


def find(corpus: str) -> Found:
    """The files that `corpus` names. Raises `ConfigError` where there is none to read, and `OSError`.

    Left out of a folder are hidden files and folders, licences and the like, files of other kinds, and a linked
    folder that has been read already, so that links in a circle come to an end. A file that is named itself is read
    whatever its name is.
    """
    root, key = Path(os.path.expanduser(corpus)), f"data.corpus = {corpus!r}"
    if root.is_file():
        if not file_kind(root):
            raise ConfigError(f"{key}: {KINDS}")
        return Found(root, [root], [])
    if not root.is_dir():
        raise ConfigError(f"{key}: no such file or folder on this machine; known names: {', '.join(KNOWN_CORPORA)}")
    found = Found(root, [], [])
    _walk(root, found)
    if not found.files:
        raise ConfigError(f"{key}: the folder has no file to read; {KINDS}")
    # By path below the root and not by what the disk returns, so that two machines read in the same order.
    found.files.sort(key=lambda path: path.relative_to(root).parts)
    return found


def file_kind(path: Path) -> str:
    """`TEXT_SUFFIX`, `PARQUET_SUFFIX` or ".jsonl", by the ending of the name; "" for a file of another kind."""
    suffix, packed = plain_suffixes(path)
    if suffix in ROWS_SUFFIXES or (packed and suffix == PACKED_ROWS_SUFFIX):
        return ROWS_SUFFIXES[0]
    if suffix == TEXT_SUFFIX or (suffix == PARQUET_SUFFIX and not packed):
        return suffix
    return ""


def _walk(root: Path, found: Found) -> None:
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        here = Path(folder)
        folders.sort()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            found.left_out.append((here.relative_to(root), "a link to a folder that is read already"))
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            found.left_out.append(((here / name).relative_to(root), "hidden"))
        for name in sorted(names):
            reason = _why_not(here / name)
            if reason:
                found.left_out.append(((here / name).relative_to(root), reason))
            else:
                found.files.append(here / name)


def _why_not(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "not a file, or a link to nothing"
    if not file_kind(path):
        return "not a kind of file that is read"
    if file_kind(path) == TEXT_SUFFIX and path.name.partition(".")[0].lower() in _NOT_CORPUS:
        return "not part of a corpus, by its name"
    return ""


def _names(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _raise(error: OSError) -> None:
    raise error
