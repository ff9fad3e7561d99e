"""Pipeline stages of a node: which layers each has, and that none can be trained yet."""

from __future__ import annotations

from itertools import pairwise

from coordinator.layout import Layout
from netem.errors import ConfigError


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """The layers of each stage: neighbours, equally many, and of what is left over one more for each of the first."""
    ends = [stage * (layers // stages) + min(stage, layers % stages) for stage in range(stages + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(ends))


def check_stages(layout: Layout) -> None:
    """Raise `ConfigError` for a layout with pipeline stages, which can be planned and not yet trained."""
    if layout.stages > 1:
        raise ConfigError(
            f"coordinator.stages = {layout.stages}: expected 1; isthmus plan and isthmus tunnel know pipelines, and no "
            "run has them yet"
        )
