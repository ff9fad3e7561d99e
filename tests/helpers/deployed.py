"""The commands of deploy/, as plain processes: what an engine would put around them is replaced, and nothing else."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from helpers import ROOT
from helpers.isthmus_runs import QUICK, environment

DEPLOY = ROOT / "deploy"
SHORT = [*QUICK, "--train.steps", "4"]


def program(folder: Path, name: str, text: str) -> Path:
    """An executable file `name` in `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def variables(folder: Path, cache: Path, **more: str) -> dict[str, str]:
    """An environment in which `isthmus` is the one of this checkout, and adds settings that make runs short.

    Programs that a test puts into FOLDER/bin come before all others.
    """
    settings = shlex.join(map(str, [*SHORT, "--run.outputs", folder / "outputs"]))
    program(folder / "bin", "isthmus", f'#!/bin/sh\nexec "{sys.executable}" -m node "$@" {settings}\n')
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment(cache, "secret") | {"PATH": path, "PYTHONPATH": str(ROOT)} | more
