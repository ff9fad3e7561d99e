"""Pipeline stages of a node: which layers each has."""

from __future__ import annotations

from itertools import pairwise


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """The layers of each stage: neighbours, equally many, and of what is left over one more for each of the first."""
    ends = [stage * (layers // stages) + min(stage, layers % stages) for stage in range(stages + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(ends))
