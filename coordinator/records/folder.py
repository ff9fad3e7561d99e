"""What a run writes, and under which names. No torch here: the coordinator and the reports need only this.

outputs/<run>/
    config.toml           the resolved config, without secrets
    coordinator.address   where the coordinator listens
    coordinator.state     what a coordinator that was killed goes on from (`coordinator.state`)
    coordinator.lease     which coordinator serves the run, so that no second one does (`coordinator.records.lease`)
    metrics.jsonl         one line a step: the run's figures and each node's
    faults.jsonl          one line for each fault, and for each node that joined later (`coordinator.events.Fault`)
    tensorboard/          the same as TensorBoard events
    report.png            loss over steps and wall-clock, traffic of each node
    trace/                single steps as each node saw them, where `run.trace` asks (`node.measure.trace_file`)
    logs/                 what coordinator and nodes printed (of `isthmus run`)
    checkpoint/step-N/    valid only with COMPLETE.json in it (`node.train.checkpoint`); `step-N.refused` was damaged

What is read back is checked: another program, a crash or a full disk may have left something else there. `metrics`
reads metrics.jsonl; `lock` keeps two processes from writing to one folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from netem.errors import ConfigError

CONFIG = "config.toml"
ADDRESS = "coordinator.address"
EVALUATION = "evaluation.json"
METRICS = "metrics.jsonl"
FAULTS = "faults.jsonl"
REPORT = "report.png"
LOGS = "logs"
_COMPLETE = "COMPLETE.json"


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Where to write what will be at `path`: it is renamed after the block, so a file of that name is always whole.

    Nothing is left behind where the block fails. A `durable` file is on the disk, also after a power failure, when the
    block has ended.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        if durable:
            _flush(unfinished)
        unfinished.replace(path)
        if durable:
            _flush(path.parent)  # the new name
    finally:
        unfinished.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make a folder and its parents. Raises `ConfigError` where the disk does not allow it, `FileExistsError` where it
    exists and must not."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        if folder.is_dir():
            raise
        raise ConfigError(f"run.outputs: {folder} is not a folder") from None
    except OSError as error:
        raise ConfigError(f"run.outputs: {folder} cannot be made: {error.strerror}") from None


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run_folder / "checkpoint" / f"step-{step:06d}"


def mark_complete(run_folder: Path, step: int, nodes: int) -> None:
    """Mark a checkpoint as whole: every node has saved its part. The mark appears at once or not at all."""
    folder = checkpoint_folder(run_folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _COMPLETE, durable=True) as unfinished:
        unfinished.write_text(json.dumps({"step": step, "nodes": nodes}) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder bears the mark."""
    return (checkpoint / _COMPLETE).is_file()


def checkpoints(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, complete or not, the last one first."""
    found = [folder for folder in (run_folder / "checkpoint").glob("step-*") if step_of(folder) >= 0]
    return sorted(found, key=step_of, reverse=True)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the last one first."""
    return [folder for folder in checkpoints(run_folder) if is_complete(folder)]


def latest_complete(run_folder: Path) -> Path | None:
    """The last complete checkpoint of a run, if there is one."""
    return next(iter(complete_checkpoints(run_folder)), None)


def drop_before(run_folder: Path, step: int) -> None:
    """Remove the checkpoints before that of `step`, complete or not. What the disk does not let go stays there.

    The mark goes first, so a folder of which only a part is left does not count.
    """
    for folder in checkpoints(run_folder):
        if step_of(folder) < step:
            with suppress(OSError):
                (folder / _COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too


def set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint that is not to be used a name under which it does not count; the new one."""
    names = (checkpoint.with_name(f"{checkpoint.name}.refused{number}") for number in ("", *map(str, range(2, 1000))))
    return checkpoint.rename(next(name for name in names if not name.exists()))


def step_of(checkpoint: Path) -> int:
    """How many steps were done when a checkpoint was made: the number in its folder's name; −1 for another name."""
    match = re.fullmatch(r"step-(\d{1,18})", checkpoint.name, re.ASCII)
    return int(match.group(1)) if match else -1


class Mark(NamedTuple):
    """What the mark of a complete checkpoint says."""

    step: int
    nodes: int
    """How many nodes wrote it."""


def read_mark(checkpoint: Path) -> Mark:
    """Read the mark of a complete checkpoint. Raises `ConfigError` where it is damaged, or is of another step."""
    path = checkpoint / _COMPLETE
    try:
        said = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        said = None
    step, nodes = (said.get("step"), said.get("nodes")) if isinstance(said, dict) else (None, None)
    if type(step) is not int or type(nodes) is not int or min(step, nodes) < 0:
        raise ConfigError(
            f'{path}: damaged; expected {{"step": …, "nodes": …}}; move {checkpoint} away to go on from the checkpoint '
            "before it"
        )
    if step != step_of(checkpoint):
        right = checkpoint_folder(Path(), step).name
        raise ConfigError(
            f"{path}: is of step {step}, and the folder's name says otherwise; rename {checkpoint} to {right}"
        )
    return Mark(step, nodes)


def read_address(run_folder: Path) -> str:
    """The address that the coordinator of a run has written. Raises `ConfigError` where there is none."""
    path = run_folder / ADDRESS
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); has the run's coordinator started?") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: holds no address; give the coordinator's, such as tcp://10.0.0.5:7070") from None


def discard_unstarted(run_folder: Path) -> None:
    """Remove the folder of a new run that failed before its first step. One that holds a step or a checkpoint stays."""
    metrics = run_folder / METRICS
    recorded = metrics.exists() and metrics.stat().st_size > 0
    if not recorded and not (run_folder / "checkpoint").exists():
        shutil.rmtree(run_folder, ignore_errors=True)
