"""Where a run is: the phases of the coordinator's machine (`coordinator.run`)."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """Where the run is. BARRIER includes the time in which the nodes compute the step before that barrier."""

    JOINING = "the nodes are joining"
    BARRIER = "a step is being computed"
    ROUND = "an averaging round is open"
    PAUSED = "too few nodes are left"
    STOPPING = "the run is ending"
    FINISHED = "the run is over"
