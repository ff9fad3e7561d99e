"""Builds the world of each generation over one node's endpoint (`node.train.world`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from coordinator.assignment import Assignment
from coordinator.messages import Roster, RosterEntry
from netem.endpoint import Endpoint
from node.config.run import RunConfig
from node.exchange.inbox import Inbox, Members
from node.exchange.payload import PayloadFormat
from node.exchange.wire import Wire
from node.measure.spans import Spans
from node.site.site import ALONE, Site
from node.train.averaging import Averager, VotingSession
from node.train.checkpoint import Courier
from node.train.world import World, build_world
from node.worker.machine import Machine, share_cores
from node.worker.meter import Meter, Plan


class WorldBuilder:
    """What lasts from one world to the next: the endpoint, the inbox, and which members are dialled.

    `timeout_s` is how long a world's wire waits for anything; `corpus` is the fingerprint that checkpoints hold;
    `machine` is what this node computes on, and `flops` gives the model's FLOPs of a step of a node with these chunks;
    `judges` is as in `Wire`, and `courier` takes checkpoints to the coordinator; `site` are the processes of this node,
    of which the roster has this one's column.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inbox: Inbox,
        payload: PayloadFormat,
        session: VotingSession,
        timeout_s: float,
        config: RunConfig,
        corpus: str,
        machine: Machine,
        flops: Callable[[tuple[int, ...], int], float],
        judges: bool = True,
        courier: Courier | None = None,
        site: Site = ALONE,
    ) -> None:
        self._endpoint = endpoint
        self._inbox = inbox
        self._payload = payload
        self._session = session
        self._timeout_s = timeout_s
        self._config = config
        self._corpus = corpus
        self._machine = machine
        self._flops = flops
        self._judges = judges
        self._courier = courier
        self._site = site
        self._spans = Spans()
        self._dialled: Mapping[str, RosterEntry] = {}
        self._averager: Averager | None = None  # of the world that was built last
        self._meter: Meter | None = None  # of the same

    def build(self, rank: int, roster: Roster) -> tuple[World, Meter]:
        """The world of `roster`, as seen from `rank`, and its meter. The world before is closed.

        Members are dialled, and those that are gone are forgotten. The inbox drops what it held of the world before. A
        node that is alone has no wire.
        """
        share_cores(self._config.threads, rank, roster, self._site.size)
        self.close()  # before its thread could send anything in the new generation
        entries = sorted(roster.members, key=lambda member: member.rank)
        peers = tuple(member.peer for member in entries)
        members = Members(roster.generation, Assignment(roster.assignment), rank, peers, roster.relays)
        self._endpoint.set_generation(roster.generation)
        self._inbox.enter(members)
        self._endpoint.share(roster.secret)
        self._dial({member.peer: member for member in entries if member.rank != rank})
        spans, folder = self._spans, self._config.folder
        alone = len(peers) == 1
        wire = None if alone else self._wire(members)
        rest = (spans, self._courier, self._site)
        world = build_world(members, self._payload, wire, self._session, folder, self._corpus, *rest)
        self._averager = world.averager
        # Files of traces and profiles are named after ranks: of a site's columns, the first one writes them.
        first = self._site.rank == 0
        traced, profiled = (
            frozenset(steps if first else ()) for steps in (self._config.traced(), self._config.profiled())
        )
        plan = Plan(partial(self._flops, world.exchange.own), traced, folder, profiled)
        self._meter = Meter(spans, wire, self._endpoint.counters, self._refused, members, self._machine, plan)
        return world, self._meter

    def _refused(self) -> int:
        door = self._endpoint.door()
        return door.refused if door else 0

    def _wire(self, members: Members) -> Wire:
        return Wire(
            self._endpoint, self._inbox, members, self._payload, self._timeout_s, self._spans, judges=self._judges
        )

    def close(self) -> None:
        """Wait until the last world's averaging has ended; its generation or the run must be over."""
        if self._averager is not None:
            self._averager.close()
            self._averager = None
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _dial(self, others: Mapping[str, RosterEntry]) -> None:
        for peer in self._dialled.keys() - others.keys():
            self._endpoint.forget(peer)
        for peer, member in others.items():
            known = self._dialled.get(peer)
            if known is None or known.address != member.address:
                self._endpoint.connect(peer, member.address, key=member.key, encrypted=member.encrypted)
        self._dialled = others
