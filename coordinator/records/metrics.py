"""Reading metrics.jsonl, with the mistakes that a crash, a full disk or another program can leave in it.

Only whole lines count: the last one may just be being written, or was cut off when its process was killed. Everything
else that is not a record is a `ConfigError` that names the file, the line and the mend. `recorder` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from netem.errors import ConfigError

_MEND = "restore the file, or move it away: a resumed run starts a new one"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of all whole lines, in the file's order. Steps that a resumed run did again are there twice.

    Every record has a number "step"; "nodes", where there is one, maps names to mappings. Numbers are floats. Raises
    `ConfigError` where the file is missing, is no file, or holds something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file; give the folder of a run, such as outputs/demo") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder in place of the metrics file; {_MEND}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return [parse_record(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def without_repeats(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with rising steps: where a resumed run did steps again, the later ones count."""
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def missing_steps(records: Iterable[Mapping[str, Any]], done: int) -> list[range]:
    """The steps from 1 to `done` that have no record, as gaps: a process was killed before their lines were written."""
    recorded = sorted({int(record["step"]) for record in records if 1 <= record["step"] <= done})
    ends = zip([0, *recorded], [*recorded, done + 1], strict=True)
    return [range(before + 1, after) for before, after in ends if after - before > 1]


def describe_steps(gaps: Iterable[range]) -> str:
    """Steps in words: "6, 9 to 12"."""
    return ", ".join(f"{gap[0]}" if len(gap) == 1 else f"{gap[0]} to {gap[-1]}" for gap in gaps)


def cut_torn_line(path: Path) -> bool:
    """Cut off a last line that was not written to its end; whether there was one. Raises `OSError`."""
    if not path.exists():
        return False
    with path.open("r+b") as file:
        content = file.read()
        whole_bytes = content.rfind(b"\n") + 1
        file.truncate(whole_bytes)
    return whole_bytes < len(content)


def parse_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The record in line `number` of `path`. Raises `ConfigError` where it is none."""
    where = f"{path}, line {number}"
    try:
        record = json.loads(line.decode("utf-8"), parse_int=float)  # float: an integer may be too long for one
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text; {_MEND}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}); {_MEND}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep; {_MEND}") from None
    if not isinstance(record, dict) or not _is_step(record.get("step")) or not _are_nodes(record.get("nodes")):
        raise ConfigError(f"{where}: expected a record with a step and its nodes' figures; {_MEND}")
    return record


def _is_step(value: object) -> bool:
    return isinstance(value, float) and value.is_integer() and value >= 0


def _are_nodes(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(figures, dict) for figures in value.values()))
