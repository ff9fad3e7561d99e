"""Builds the world of each generation over one node's endpoint (`node.train.world`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coordinator.assignment import Assignment
from coordinator.messages import Roster
from netem.endpoint import Endpoint
from node.exchange.inbox import Inbox, Members
from node.exchange.payload import PayloadFormat
from node.exchange.wire import Wire
from node.train.averaging import VotingSession
from node.train.world import World, build_world
from node.worker.meter import Meter


class WorldBuilder:
    """What lasts from one world to the next: the endpoint, the inbox, and which members are dialled.

    `timeout_s` is how long a world's wire waits for anything; `run_folder` is where checkpoints are, which hold the
    fingerprint `corpus`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inbox: Inbox,
        payload: PayloadFormat,
        session: VotingSession,
        timeout_s: float,
        run_folder: Path,
        corpus: str,
    ) -> None:
        self._endpoint = endpoint
        self._inbox = inbox
        self._payload = payload
        self._session = session
        self._timeout_s = timeout_s
        self._run_folder = run_folder
        self._corpus = corpus
        self._dialled: Mapping[str, str] = {}

    def build(self, rank: int, roster: Roster) -> tuple[World, Meter]:
        """The world of `roster`, as seen from `rank`, and its meter.

        Members are dialled, and those that are gone are forgotten. The inbox drops what it held of the world before. A
        node that is alone has no wire.
        """
        entries = sorted(roster.members, key=lambda member: member.rank)
        peers = tuple(member.peer for member in entries)
        members = Members(roster.generation, Assignment(roster.assignment), rank, peers)
        self._endpoint.set_generation(roster.generation)
        self._inbox.enter(members)
        self._dial({member.peer: member.address for member in entries if member.rank != rank})
        wire = Wire(self._endpoint, self._inbox, members, self._payload, self._timeout_s) if len(peers) > 1 else None
        world = build_world(members, self._payload, wire, self._session, self._run_folder, self._corpus)
        return world, Meter(wire, self._inbox, world.averager, self._endpoint.counters)

    def _dial(self, addresses: Mapping[str, str]) -> None:
        for peer in self._dialled.keys() - addresses.keys():
            self._endpoint.forget(peer)
        for peer, address in addresses.items():
            if self._dialled.get(peer) != address:
                self._endpoint.connect(peer, address)
        self._dialled = addresses
