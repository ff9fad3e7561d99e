"""What the coordinator must know of the training that it coordinates. `run` works from this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.assignment import Assignment
from netem.schedule import Schedule

TAKE = "take"
"""The kind of a round without data, on whose commit all members take the step that they hold. What follows it in the
step is done with the weights after that step. A step without such a round is taken when the next one begins."""


class Worker(NamedTuple):
    """What is known of a node to which chunks are given: its plain name, its place among the nodes that the run began
    with, the speed that was measured in FLOP/s, 0 for none yet, and its device's memory in bytes, 0 for unknown."""

    name: str
    place: int
    flops_per_s: float
    memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run; `node.commands.coordinator` makes it from the whole configuration.

    Steps `start_step` to `steps`−1 are to be done, each on `batch` contexts, of which the first is `start_cursor`.
    `rounds_for(step)` is a pure function that gives the kinds of averaging in that step, in order. `begins_for(step)`
    gives the kinds whose data starts to travel as that step starts, and `ends_for(step)` those of them that are agreed
    on in it, after its other rounds. Nodes must join with the same `config_digest`. `schedule` is the emulated network
    and its planned changes. Of the complete checkpoints, which at the start are those of the steps `kept`, the last
    `keep_last` stay; 0 keeps all. `lost_with(step)` says for how many steps a node that is lost after `step` steps has
    changed its weights alone, since they were averaged. `share_out` gives the chunks to the nodes of a later
    generation, by rank; where it is None, each gets as large a part as before. It raises `ConfigError` where they do
    not fit.
    """

    run_name: str
    chunks: int
    steps: int
    batch: int
    config_digest: str
    rounds_for: Callable[[int], Sequence[str]]
    begins_for: Callable[[int], Sequence[str]] = field(default=lambda step: ())
    ends_for: Callable[[int], Sequence[str]] = field(default=lambda step: ())
    schedule: Schedule
    lost_with: Callable[[int], int] = field(default=lambda step: 0)
    share_out: Callable[[Sequence[Worker]], Assignment] | None = None
    start_step: int = 0
    start_cursor: int = 0
    keep_last: int = 0
    kept: Sequence[int] = ()

    def cursor_at(self, step: int) -> int:
        """The first context that the step after `step` steps is done on."""
        return self.start_cursor + self.batch * (step - self.start_step)
