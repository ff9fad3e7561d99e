"""One node, from joining the run to leaving it, for `isthmus node`.

It makes what lasts for the whole run: corpus, model, endpoint, session with the coordinator, trainer. Then the trainer
trains in one world after another, as the coordinator begins generations. One endpoint carries control and bulk; its
receiver is the inbox.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from coordinator.client import Session, sender
from coordinator.files.courier import Courier
from coordinator.files.depot import Depot
from coordinator.keyring import node_access
from coordinator.layout import PLAIN, SitePlace
from coordinator.messages import COORDINATOR, RUN_ID, Roster
from netem.door import DoorLimits
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, GenerationOver, IsthmusError, PeerLate, ProtocolError, RunAborted
from netem.keys import Access
from netem.limits import Limits
from netem.profile import resolve_schedule
from netem.schedule import Schedule, Timed
from netem.sockets import advertised
from node.config import Config, RunConfig
from node.data import Task, open_data
from node.data.task import check_room
from node.exchange.inbox import Inbox
from node.exchange.payload import PayloadFormat
from node.measure.flops import step_flops
from node.model.exchanged import ExchangedLlama
from node.site.deadline import Deadline
from node.site.sharding import shard
from node.site.site import Site
from node.train.from_config import first_model, payload_format
from node.train.schedule import StepSchedule
from node.train.trainer import Trainer
from node.worker.arrival import ENOUGH, Arrival, Shortfall
from node.worker.handover import Handover
from node.worker.machine import Machine
from node.worker.opening import HEAD_START_S, Opening
from node.worker.world_builder import WorldBuilder

log = logging.getLogger("isthmus.node")

SWITCH_S = 0.0005
"""How long a thread may keep the interpreter while another one waits for it; Python's default is ten times that."""

TRAINER_NICE = 10
"""The nice value of the thread that trains."""

FAREWELL_S = 2.0
"""How long the coordinator may take to acknowledge that this node leaves. It may have gone already."""

MEMBERS_ONLY = Limits(max_strangers=0)
"""A node listens to the coordinator and to the members that it has dialled. Frames of others are only counted."""


@dataclass(frozen=True)
class Place:
    """A node's addresses, name and rank."""

    join: str  # the coordinator's address
    bind: str  # "tcp://INTERFACE:PORT" on which this node listens
    advertise: str  # HOST or HOST:PORT at which peers dial this node; empty: as in `bind`
    name: str
    rank: int  # the rank that it asks for, −1 for none
    at_site: SitePlace = PLAIN  # where it is one process of a site


def run_node(config: Config, place: Place, shortfall: Shortfall = ENOUGH) -> None:
    """Join the run, train, leave. Raises `ConfigError` where this node is refused, `RunAborted` where the run ends.

    `shortfall` is asked where this node takes over chunks of others.
    """
    site = Site.from_environment(config.coordinator.layout)
    device = site.device(choose_device(config.run))
    site.open(device, config.coordinator.progress_timeout_s + config.coordinator.step_timeout_s)
    try:
        _run(config, in_site(place, site), site, device, shortfall)
    finally:
        site.close()


def _run(config: Config, place: Place, site: Site, device: torch.device, shortfall: Shortfall) -> None:
    opening = Opening(partial(_open, config))
    opening.wait(HEAD_START_S)
    warn_of_leak(config)
    payload = payload_format(config)
    inbox = Inbox(payload)
    network = resolve_schedule(config.net)
    access, lead = node_access(config.coordinator, place.bind)
    endpoint = Endpoint(
        unique(place.name, access.pair.public),
        RUN_ID,
        network.profile,
        inbox,
        bind=place.bind,
        limits=MEMBERS_ONLY,
        access=access,
        door=DoorLimits(most_new=64 + 2 * config.coordinator.nodes, most_new_of_a_source=32 + config.coordinator.nodes),
    )
    try:
        _take_part(config, place, site, device, opening, payload, inbox, endpoint, access, lead, network, shortfall)
    finally:
        if (door := endpoint.door()) is not None and door.refused:
            log.warning("connections refused: %d (%s)", door.refused, door)
        endpoint.close()


def in_site(place: Place, site: Site) -> Place:
    """The place of one process of a site, of which all were given the same `place`. The name is that of the site."""
    if not site.several:
        return place
    name = site.share_text(place.name)
    bind, advertise = (_nth_port(address, site.local_rank) for address in (place.bind, place.advertise))
    at_site = SitePlace(name, site.rank, site.size)
    return replace(place, name=f"{name}.{site.rank}", bind=bind, advertise=advertise, at_site=at_site)


def _nth_port(address: str, number: int) -> str:
    """The address with a port that is `number` higher; port 0, or none, stays."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if port.isdecimal() and int(port) else address


def _open(config: Config) -> Task:
    task = open_data(config.data)
    check_room(task, config.model.context, config.train.batch)
    log.info("corpus: %s", task.summary)
    return task


class _Made(NamedTuple):
    """What is made once the corpus is there."""

    trainer: Trainer
    builder: WorldBuilder
    arrival: Arrival


def _builder(
    config: Config,
    task: Task,
    endpoint: Endpoint,
    inbox: Inbox,
    payload: PayloadFormat,
    session: Session,
    courier: Courier | None,
    site: Site,
) -> WorldBuilder:
    schedule = StepSchedule(config.model, config.compress, config.train)

    def flops(own: tuple[int, ...], step: int) -> float:
        spec = schedule.pass_spec(step)
        return step_flops(config.model, config.compress, config.train.batch // site.size, own, spec, task.vocab_size)

    return WorldBuilder(
        endpoint,
        inbox,
        payload,
        session,
        config.coordinator.step_timeout_s,
        config.run,
        task.fingerprint,
        Machine(torch.device(config.run.device)),
        flops,
        judges=config.train.nonfinite == "stop",
        courier=courier,
        site=site,
    )


def _take_part(
    config: Config,
    place: Place,
    site: Site,
    device: torch.device,
    opening: Opening,
    payload: PayloadFormat,
    inbox: Inbox,
    endpoint: Endpoint,
    access: Access,
    lead: str,
    network: Schedule,
    shortfall: Shortfall,
) -> None:
    address = advertised(endpoint.address, place.advertise)
    word_s = network.profile.link(COORDINATOR, place.name).latency_s

    def follow(heard: float, changes: tuple[Timed, ...]) -> None:
        """The run began when the coordinator sent the roster, which was one latency before it arrived here."""
        endpoint.follow(network.with_timed(changes), heard - word_s)

    session = Session(
        config.coordinator,
        sender(endpoint),
        run=config.run.name,
        name=place.name,
        address=address,
        config_digest=config.digest(),
        access=access,
        memory_bytes=Machine(device).memory_bytes,
        rank=place.rank,
        on_network=follow,
        place=place.at_site,
    )
    inbox.follow(session)
    courier = Courier(endpoint, Depot(config.run.folder), inbox.raise_if_over) if config.train.collect else None
    inbox.files = courier
    connect = partial(endpoint.connect, COORDINATOR, place.join, answers_only=True, key=lead)
    made: _Made | None = None
    try:
        task = opening.take(session, connect)
        model = shard(first_model(config, task.vocab_size, payload.ranks), site, device)
        inbox.ring_cap_bytes = _ring_cap_bytes(model)
        builder = _builder(config, task, endpoint, inbox, payload, session, courier, site)
        handover, cap_bytes = Handover(endpoint, inbox), _state_cap_bytes(model)
        arrival = Arrival(handover, network.profile, place.name, cap_bytes, shortfall)
        made = _Made(Trainer(config, task, model, site), builder, arrival)
        connect()  # and ask to join at once: before that, a refusal would mean nothing to the session
        with site.guarded():
            _train(made, session, place, site, config.coordinator.step_timeout_s)
    except Exception as error:  # also a fault of our own: the others say then what it was
        # A step that no node may take, or settings with which none can go on, end the run; all else only this node.
        ends_run = isinstance(error, RunAborted | ConfigError) and session.abort_reason is None
        session.fail(str(error) if isinstance(error, IsthmusError) else repr(error), ends_run)
        raise
    finally:
        if made is not None:
            made.trainer.close(FAREWELL_S)
        session.leave()
        if made is not None:
            made.arrival.close()
            made.builder.close()
        for peer in endpoint.counters():
            if peer != COORDINATOR:
                endpoint.forget(peer)  # the run is over: what a member has not acknowledged, it does not need
        endpoint.flush(FAREWELL_S)


def _train(made: _Made, session: Session, place: Place, site: Site, limit_s: float) -> None:
    """Train in the world of each generation, until the run is over. A process that does not come out of one that is
    over within `limit_s`, because its site does not answer, ends."""
    trainer, builder, arrival = made
    deadline = Deadline(limit_s)
    if site.several:
        session.on_generation(deadline.over)
    for rank, roster in _rosters(session, place):
        log.info("joined as rank %d of %d, generation %d", rank, len(roster.members), roster.generation)
        yield_to_the_network()
        world, meter = builder.build(rank, roster)
        try:
            with deadline.inside(roster.generation):
                site.agree_on(roster.generation)
                with site.together():
                    arrival.bring(trainer, world, roster)
                trainer.run(world, session, meter)
        except GenerationOver:
            log.info("generation %d is over", roster.generation)
        except (PeerLate, ProtocolError) as error:
            # The coordinator finds out whose fault it is, and begins another generation.
            if error.peer in ("", COORDINATOR):
                raise
            log.warning("%s", error)
            session.suspect(error.peer, str(error))
        finally:
            arrival.close()  # before anything is sent in the next generation


def yield_to_the_network() -> None:
    """Let other threads, above all those that move messages, go before this one, which trains.

    Where several nodes share the cores, a message would otherwise wait until a step's compute leaves a core or the
    interpreter to it, and the emulated network would be late by that. On Linux a nice value belongs to a thread, and
    the threads that torch starts from this one inherit it.
    """
    sys.setswitchinterval(SWITCH_S)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), TRAINER_NICE)


def _rosters(session: Session, place: Place) -> Iterator[tuple[int, Roster]]:
    try:
        yield from session.rosters()
    except ConfigError as error:
        raise ConfigError(f"--join {place.join}: {error}") from None


def warn_of_leak(config: Config) -> None:
    """Warn in the log where the settings let the prediction of a token depend on later tokens (`Config.leaks`)."""
    if config.leaks:
        log.warning(
            'this model leaks: with compress.own = "projected", theta of the chunk\'s own mean tells early tokens of a '
            'chunk of later ones. Its losses are marked "leaks", and do not compare with others'
        )


def choose_device(run: RunConfig) -> torch.device:
    """The device of `run.device`; sets `run.threads`. Raises `ConfigError` where this machine has no such device."""
    device = torch.device(run.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'run.device = {run.device!r}: torch finds no GPU here; set run.device = "cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"run.device = {run.device!r}: this machine has {torch.cuda.device_count()} GPUs")
    if run.threads:
        torch.set_num_threads(run.threads)
    return device


def _ring_cap_bytes(model: ExchangedLlama) -> int:
    """Most bytes of ring shards that may wait here before they are asked for.

    The node before this one in the ring needs shards from this one, so it can be at most one lap ahead, which is one
    vector. Four times as much leaves room.
    """
    elements = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(codec.shape.groups * codec.shape.width**2 for _, codec in model.codecs())
    return 4 * 4 * max(elements, moments, 1 << 20)


def _state_cap_bytes(model: ExchangedLlama) -> int:
    """Most bytes of a state that a member may hand over: weights, two moments of each, agreed weights, momentum, what
    averaging has left out, and the second moments of K and V, with as much again to spare."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(codec.shape.groups * codec.shape.width**2 for _, codec in model.codecs())
    return 2 * 4 * (6 * elements + 2 * moments) + (1 << 20)
