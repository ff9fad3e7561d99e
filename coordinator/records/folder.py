"""What a run writes, and under which names. No torch here: the coordinator and the reports need only this.

outputs/<run>/
    config.toml           the resolved config, without secrets
    metrics.jsonl         one line a step: the run's figures and each node's
    tensorboard/          the same as TensorBoard events
    report.png            loss over steps and wall-clock, traffic of each node
    logs/                 what coordinator and nodes printed (of `isthmus run`)
    checkpoint/step-N/    valid only with COMPLETE.json in it (`node.train.checkpoint`)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netem.errors import ConfigError

CONFIG = "config.toml"
ADDRESS = "coordinator.address"
EVALUATION = "evaluation.json"
METRICS = "metrics.jsonl"
REPORT = "report.png"
LOGS = "logs"
_COMPLETE = "COMPLETE.json"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what will be at `path`: it is renamed after the block, so a file of that name is always whole.

    Nothing is left behind where the block fails.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
    with whole_file(folder / _COMPLETE) as unfinished:
        unfinished.write_text(json.dumps({"step": step, "nodes": nodes}) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder bears the mark."""
    return (checkpoint / _COMPLETE).is_file()


def latest_complete(run_folder: Path) -> Path | None:
    """The last complete checkpoint of a run, if there is one."""
    complete = [folder for folder in (run_folder / "checkpoint").glob("step-*") if is_complete(folder)]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """How many steps were done when a checkpoint was made: the number in its folder's name."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(match.group(1)) if match else -1


def nodes_of(checkpoint: Path) -> int:
    """How many nodes wrote a complete checkpoint."""
    return int(json.loads((checkpoint / _COMPLETE).read_text())["nodes"])
