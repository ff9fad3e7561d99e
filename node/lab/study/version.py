"""A digest of the code on which a run's figures depend, so that results of other code are not taken for new ones.

The digest is taken from the syntax trees without docstrings: comments and layout do not change it, any statement may.
Sockets, checkpoints, reports and the command line have no influence on a run's figures, and none on the digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import node

_ROOT = Path(node.__file__).parent
_PARTS = ("model", "subspace", "train", "exchange", "data", "config/seeds.py", "lab/study/measure.py")
_NO_PART = (
    *("exchange/inbox.py", "exchange/wire.py", "exchange/tags.py", "exchange/transfer_tags.py", "data/hub_reader.py"),
    *("train/checkpoint.py", "train/file_digest.py", "train/parts.py", "train/writer.py"),
    *("train/transfer.py", "train/pieces.py"),
)


@functools.cache
def code_version() -> str:
    """16 hex digits, the same for the same statements."""
    state = hashlib.blake2b(digest_size=8)
    for path in sorted(file for part in _PARTS for file in _files(_ROOT / part)):
        name = path.relative_to(_ROOT).as_posix()
        if name not in _NO_PART:
            state.update(name.encode() + statements(path.read_text(encoding="utf-8")).encode())
    return state.hexdigest()


def statements(source: str) -> str:
    """The syntax tree of a module in one line, without docstrings and line numbers."""
    tree = ast.parse(source)
    for place in ast.walk(tree):
        if isinstance(place, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(place) is not None:
            place.body = place.body[1:]
    return ast.dump(tree)


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]
