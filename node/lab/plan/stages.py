"""Pipeline stages: which layers each has, and in which order it computes passes."""

from __future__ import annotations

from typing import NamedTuple

from node.config.train import PipelineName
from node.lab.plan.simulate import BACKWARD, FORWARD
from node.lab.plan.work import Array, Work


class Stages(NamedTuple):
    """How the layers of a step are dealt to stages, and the stages to nodes."""

    layers: tuple[range, ...]
    """By stage."""
    inside: int
    """Neighbouring stages that are in one node; the next ones are in other nodes, with the same chunks."""
    schedule: PipelineName
    boundary_bytes: Array
    """[R] activations of one pass between two stages, of all shards; their gradient is as large."""
    optimizers: tuple[Work, ...]
    """By stage."""


def order(schedule: PipelineName, stage: int, stages: int, passes: int) -> list[tuple[int, int]]:
    """(way, pass) of all that a stage computes, in order.

    gpipe: all forwards, then all backwards (Huang et al., "GPipe", arXiv 1811.06965). 1f1b: as many forwards as there
    are stages from this one on, and from then on a backward before each further forward (Narayanan et al.,
    "PipeDream-Flush", arXiv 2006.09503).
    """
    forwards = [(FORWARD, number) for number in range(passes)]
    backwards = [(BACKWARD, number) for number in range(passes)]
    first = in_flight(schedule, stage, stages, passes)
    pairs = zip(backwards, forwards[first:], strict=False)
    turns = [action for pair in pairs for action in pair]
    return forwards[:first] + turns + backwards[passes - first :]


def in_flight(schedule: PipelineName, stage: int, stages: int, passes: int) -> int:
    """Passes whose activations a stage keeps at once, at most."""
    return min(passes, stages - stage) if schedule == "1f1b" else passes
