"""torch's own profiler over single steps: <run>/profile/node-R-step-N.json, for Perfetto's viewer or Chrome's.

It shows each operation of torch and each kernel of the GPU, where `trace_file` shows what Isthmus does. A profiled step
is slower, and its figures say so in no other way.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("isthmus.profile")

PROFILE = "profile"
"""The folder of profiles in a run's folder."""


class StepProfiler:
    """Profiles these `steps` of the node of `rank`."""

    def __init__(self, steps: frozenset[int], run_folder: Path, rank: int) -> None:
        self._steps, self._folder, self._rank = steps, run_folder / PROFILE, rank
        self._running: profile | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Step `step` begins now, and the one before is over."""
        self.end()
        if step in self._steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running, self._step = profile(activities=activities), step
            self._running.__enter__()

    def end(self) -> None:
        """Write the profile of the step that ends now, if it has one."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        path = self._folder / f"node-{self._rank}-step-{self._step}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # the training is worth more than its profile
            log.warning("run.profile: %s cannot be written: %s", path, error)
