"""What is to be run, as far as the coordinator must know. No behaviour; `run` goes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netem.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run; the node floor makes it from its own config.

    Steps `start_step` to `steps`−1 are done, on `batch` contexts each from `start_cursor` on.
    `rounds_for(step)` are the kinds of averaging at the end of that step, in order: a pure function.
    `config_digest` is what joiners bring; `schedule` is the emulated network, and what changes in it.
    """

    run_name: str
    chunks: int
    steps: int
    batch: int
    config_digest: str
    rounds_for: Callable[[int], Sequence[str]]
    schedule: Schedule
    start_step: int = 0
    start_cursor: int = 0
