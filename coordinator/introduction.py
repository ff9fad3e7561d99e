"""What a node says of itself when it asks to join: its names, and the process, machine and cores that it is on."""

from __future__ import annotations

import os
import socket

import msgspec

from coordinator.layout import SitePlace
from coordinator.messages import PROTOCOL_VERSION, Join
from netem import cores
from netem.keys import Access


def introduce(
    run: str,
    name: str,
    address: str,
    config_digest: str,
    access: Access | None,
    memory_bytes: float,
    rank: int,
    place: SitePlace,
) -> Join:
    """The request of this process to join the run `run` (`coordinator.messages.Join`)."""
    return Join(
        name=name,
        key=access.pair.public if access else "",
        encrypted=bool(access and access.encrypts),
        version=PROTOCOL_VERSION,
        run=run,
        config_digest=config_digest,
        address=address,
        host=socket.gethostname(),
        pid=os.getpid(),
        cores=cores.name(),
        memory_bytes=memory_bytes,
        rank=rank,
        site=place.site,
        local_rank=place.local_rank,
        processes=place.processes,
    )


def without_data(join: Join) -> Join:
    """The same of a node that still prepares its data."""
    return msgspec.structs.replace(join, preparing=True)
