"""The world of one generation: all that follows from its membership, built whole by `build_world`, dropped whole.

A trainer is given a world to train in and keeps nothing of it: in the next generation it gets another one, with other
members, ranks and chunks, for the same model and optimizer. `node.worker.node` builds worlds over sockets,
`node.lab.in_process` and tests over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from node.exchange.chunks import ChunkExchange, ChunkWire
from node.exchange.inbox import Members
from node.exchange.payload import PayloadFormat
from node.measure.spans import Spans
from node.site.site import ALONE, Site
from node.site.steady import SteadyWire
from node.train.averaging import Averager, ShardWire, VotingSession
from node.train.checkpoint import Checkpoints, Courier


class WorldWire(ChunkWire, ShardWire, Protocol):
    """A way to the other members, for the chunk exchange and for averaging rounds (`node.exchange.wire.Wire`)."""


@dataclass(frozen=True)
class World:
    """One generation, as seen from one of its members."""

    members: Members
    exchange: ChunkExchange
    averager: Averager
    checkpoints: Checkpoints
    """This node's part of each checkpoint, which is named after its rank."""

    @property
    def rank(self) -> int:
        """This node's rank in this generation."""
        return self.members.rank

    @property
    def spans(self) -> Spans:
        """What is told where the time of this node's steps goes."""
        return self.exchange.spans

    @property
    def share(self) -> float:
        """This node's part of all tokens."""
        return self.members.assignment.weights()[self.rank]


def build_world(
    members: Members,
    payload: PayloadFormat,
    wire: WorldWire | None,
    session: VotingSession,
    run_folder: Path,
    corpus: str = "",
    recorder: Spans | None = None,
    courier: Courier | None = None,
    site: Site = ALONE,
) -> World:
    """The world of `members`. `wire` reaches the others; a node that is alone has none. Checkpoints hold the corpus's
    fingerprint `corpus`, and are handed in with `courier`. `recorder` is told where the time goes. `site` are the
    processes of this node; the others of this world are then those of the same column."""
    recorder = recorder or Spans()
    assignment, rank = members.assignment, members.rank
    steady = SteadyWire(wire, site) if wire is not None and site.several else wire
    return World(
        members=members,
        exchange=ChunkExchange(assignment, rank, payload, steady, recorder),
        averager=Averager(rank, assignment.n_ranks, wire, session, recorder, site),
        checkpoints=Checkpoints(run_folder, rank, corpus, assignment.n_ranks, courier, site),
    )
