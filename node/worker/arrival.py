"""Brings a trainer to the step at which a generation begins, and those who join with it (`node.worker.handover`).

A node that joins a run that goes on gets the state of a member that has it; in the first generation of a resumed run
each node goes on from its checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.messages import Roster
from netem.errors import ConfigError, IsthmusError, RunAborted
from netem.network import Profile
from node.train.pieces import Packed
from node.train.world import World
from node.worker.handover import Handover, terms_for

log = logging.getLogger("isthmus.node")


Shortfall = Callable[[Assignment, int], str]
"""Of an assignment and a rank: why the node has no memory for that, or "" where it has."""


def _enough(assignment: Assignment, rank: int) -> str:
    return ""


ENOUGH: Shortfall = _enough
"""Every node has memory for everything."""


class Pupil(Protocol):
    """What can be brought to a step (`node.train.trainer.Trainer`)."""

    done: int

    def settle(self, steps: int) -> None: ...

    def resume(self, world: World, step: int) -> None: ...

    def join(self, tensors: dict[str, Tensor], step: int) -> None: ...

    def share(self) -> Packed: ...


class Arrival:
    """One node's way into each generation. A state that it gets has at most `cap_bytes` bytes; `name` is its plain
    name in `profile`. `shortfall` says why this node has no memory for its chunks, or nothing."""

    def __init__(
        self, handover: Handover, profile: Profile, name: str, cap_bytes: int, shortfall: Shortfall = ENOUGH
    ) -> None:
        self._shortfall = shortfall
        self._most_chunks = 0
        self._handover = handover
        self._profile = profile
        self._name = name
        self._cap_bytes = cap_bytes

    def bring(self, trainer: Pupil, world: World, roster: Roster) -> None:
        """Bring the trainer to the roster's step, and then answer those who join.

        Raises `GenerationOver` and `RunAborted` as every wait does, `RunAborted` also where this node has no memory for
        chunks that it took over from others, and `IsthmusError` where no member can give its state to this node, or
        this node cannot take it.
        """
        self._check_memory(world)
        step = roster.start_step
        trainer.settle(step)
        if any(entry.joins for entry in roster.members if entry.rank == world.rank):
            self._fetch(trainer, world, roster)
        elif step != trainer.done:
            trainer.resume(world, step)
            log.info("resumed after step %d", step)
        self._handover.serve(trainer.share)

    def close(self) -> None:
        """The generation is over: answer nobody any more."""
        self._handover.close()

    def _check_memory(self, world: World) -> None:
        chunks = len(world.exchange.own)
        if 0 < self._most_chunks < chunks and (text := self._shortfall(world.members.assignment, world.rank)):
            raise RunAborted(f"too few nodes are left: {text}; start more, and go on with run.resume = true")
        self._most_chunks = max(self._most_chunks, chunks)

    def _fetch(self, trainer: Pupil, world: World, roster: Roster) -> None:
        donors = [entry.name for entry in roster.members if not entry.joins]
        log.info("the run is at step %d; getting the weights after it from one of %s", roster.start_step, donors)
        terms = terms_for(self._profile, self._name, donors)
        tensors = self._handover.fetch(world.members, roster.start_step, self._cap_bytes, terms)
        try:
            trainer.join(tensors, roster.start_step)
        except ConfigError as error:  # the others can go on, so it is not a mistake for which the run must end
            raise IsthmusError(str(error)) from None
