"""One node, from joining the run to leaving it: what `isthmus node` does.

It puts the rooms together: corpus, model, endpoint, session with the coordinator, exchange, trainer. One endpoint
carries control and bulk; its receiver is the inbox.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from coordinator.assignment import Assignment
from coordinator.client import Session, sender
from coordinator.messages import COORDINATOR, RUN_ID, Roster
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, IsthmusError
from netem.limits import Limits
from netem.profile import resolve_schedule
from netem.schedule import Schedule, Timed
from netem.sockets import parse_address
from node.config import Config
from node.data import Task, open_data
from node.data.task import check_room
from node.exchange.chunks import ChunkExchange
from node.exchange.inbox import Inbox, World
from node.exchange.payload import PayloadFormat
from node.exchange.wire import Wire
from node.model.exchanged import ExchangedLlama
from node.train.averaging import Averager
from node.train.checkpoint import Checkpoints
from node.train.trainer import Trainer
from node.worker.meter import Meter

log = logging.getLogger("isthmus.node")

FAREWELL_S = 2.0
"""How long the coordinator may take to acknowledge that this node leaves. It may have gone already."""

MEMBERS_ONLY = Limits(max_strangers=0)
"""A node hears the coordinator and the members that it has dialled. Whoever else calls is counted, and not heard."""


@dataclass(frozen=True)
class Place:
    """Where this node stands in the network, and what it would like to be called."""

    join: str  # the coordinator's address
    bind: str  # "tcp://INTERFACE:PORT" on which peers reach this node
    advertise: str  # the host that peers are told; empty: as bound
    name: str
    rank: int  # a wish, −1 for none


def run_node(config: Config, place: Place) -> None:
    """Join the run, train, leave. Raises `ConfigError` where this node is refused, `RunAborted` where the run ends."""
    device = choose_device(config)
    task = open_data(config.data)
    log.info("corpus: %s", task.summary)
    check_room(task, config.model.context, config.train.batch)
    warn_of_leak(config)
    payload = PayloadFormat(config)
    model = ExchangedLlama(config, task.vocab_size, payload.ranks).to(device)
    inbox = Inbox(payload, ring_cap_bytes=_ring_cap_bytes(model))
    network = resolve_schedule(config.net)
    endpoint = Endpoint(unique(place.name), RUN_ID, network.profile, inbox, bind=place.bind, limits=MEMBERS_ONLY)
    try:
        _take_part(config, place, task, payload, model, inbox, endpoint, network)
    finally:
        endpoint.close()


def _take_part(
    config: Config,
    place: Place,
    task: Task,
    payload: PayloadFormat,
    model: ExchangedLlama,
    inbox: Inbox,
    endpoint: Endpoint,
    network: Schedule,
) -> None:
    endpoint.connect(COORDINATOR, place.join, answers_only=True)
    address = _advertised(endpoint.address, place.advertise)
    word_s = network.profile.link(COORDINATOR, place.name).latency_s

    def follow(heard: float, changes: tuple[Timed, ...]) -> None:
        """The run began when the coordinator said so, which is a while before it was heard here."""
        endpoint.follow(network.with_timed(changes), heard - word_s)

    session = Session(
        config.coordinator,
        sender(endpoint),
        run=config.run.name,
        name=place.name,
        address=address,
        config_digest=config.digest(),
        rank=place.rank,
        on_network=follow,
    )
    inbox.follow(session)
    try:
        rank, roster = _join(session, place)
        log.info("joined as rank %d of %d, listening at %s", rank, len(roster.members), address)
        wire = _meet(config, rank, roster, inbox, endpoint, payload)
        assignment = Assignment(roster.assignment)
        exchange = ChunkExchange(assignment, rank, payload, wire)
        averager = Averager(rank, assignment.n_ranks, wire, session)
        checkpoints = Checkpoints(config.run.folder, rank, task.fingerprint)
        trainer = Trainer(config, task, model, exchange, averager, checkpoints)
        if roster.start_step:
            trainer.resume(roster.start_step)
            log.info("resumed after step %d", roster.start_step)
        trainer.run(roster.start_step, session, Meter(wire, inbox, averager, endpoint.counters))
    except Exception as error:  # also a fault of our own: the others say then what it was
        session.fail(str(error) if isinstance(error, IsthmusError) else repr(error))
        raise
    finally:
        session.leave()
        for peer in endpoint.counters():
            if peer != COORDINATOR:
                endpoint.forget(peer)  # the run is over: what a member has not acknowledged, it does not need
        endpoint.flush(FAREWELL_S)


def _join(session: Session, place: Place) -> tuple[int, Roster]:
    try:
        return session.join()
    except ConfigError as error:
        raise ConfigError(f"--join {place.join}: {error}") from None


def _meet(
    config: Config, rank: int, roster: Roster, inbox: Inbox, endpoint: Endpoint, payload: PayloadFormat
) -> Wire | None:
    """Dial every peer. A world of one has no wire at all."""
    endpoint.set_generation(roster.generation)
    peers = tuple(member.peer for member in sorted(roster.members, key=lambda member: member.rank))
    world = World(Assignment(roster.assignment), rank, peers)
    for member in roster.members:
        if member.rank != rank:
            endpoint.connect(member.peer, member.address)
    if len(peers) == 1:
        return None
    timeout_s = config.coordinator.step_timeout_s
    return Wire(endpoint, inbox, world, payload, timeout_s)


def _advertised(bound: str, host: str) -> str:
    """The address that peers are told: as bound, or with another host in it (behind NAT, in a container)."""
    if not host:
        return bound
    address = f"tcp://{host}:{bound.rpartition(':')[2]}"
    parse_address(address, "--advertise", dial=True)
    return address


def warn_of_leak(config: Config) -> None:
    """Say in the log where the combination of settings lets a token know of later ones (`Config.leaks`)."""
    if config.leaks:
        log.warning(
            'this model leaks: with compress.own = "projected", theta of the chunk\'s own mean tells early tokens of a '
            'chunk of later ones. Its losses are marked "leaks", and do not compare with others'
        )


def choose_device(config: Config) -> torch.device:
    """The device of `run.device`, with `run.threads` set. Raises `ConfigError` where this machine has none such."""
    device = torch.device(config.run.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'run.device = {config.run.device!r}: torch finds no GPU here; set run.device = "cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"run.device = {config.run.device!r}: this machine has {torch.cuda.device_count()} GPUs")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return device


def _ring_cap_bytes(model: ExchangedLlama) -> int:
    """Ring shards that may wait here unasked for. The node before this one gets at most a lap ahead, before it needs
    what this one sends: that is one vector, and four times as much leaves room."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(codec.shape.groups * codec.shape.width**2 for _, codec in model.codecs())
    return 4 * 4 * max(elements, moments, 1 << 20)
