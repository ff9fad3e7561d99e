"""`isthmus launch`: one process of a launcher that starts the same command everywhere (torchrun, Slurm, Kubernetes).

The launcher's environment says which process this is (`spot_of`). Each is a node, and the one of rank 0 also starts the
coordinator, which the others find at MASTER_ADDR. The coordinator's port is not MASTER_PORT: torchrun listens there
itself.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coordinator.records.folder import ADDRESS
from netem.children import Child, Children
from netem.errors import ConfigError, RunAborted
from netem.sockets import parse_address
from node.config import Config

log = logging.getLogger("isthmus.launch")

RANK = ("RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
WORLD_SIZE = ("WORLD_SIZE", "SLURM_NTASKS")
LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")
MASTER = "MASTER_ADDR"
RETRY_S = 1.0
START_TIMEOUT_S = 60.0


class Spot(NamedTuple):
    """Which of a launcher's processes this is."""

    rank: int
    world: int
    master: str
    """The host of rank 0."""
    gpu: int | None
    """The number of its GPU among those that it sees, where the launcher says which process of its machine it is."""


class Command(NamedTuple):
    """What was typed, for the coordinator's own process."""

    config: Path
    preset: str
    settings: tuple[str, ...]


def spot_of(environment: Mapping[str, str]) -> Spot:
    """What the launcher's variables say. Raises `ConfigError` where they are missing or at odds."""
    rank, world = _number(environment, RANK), _number(environment, WORLD_SIZE)
    if rank is None or world is None:
        missing = " or ".join(RANK if rank is None else WORLD_SIZE)
        raise ConfigError(
            f"{missing}: not in the environment; start this command by a launcher, such as torchrun or srun, or set "
            "RANK, WORLD_SIZE and MASTER_ADDR"
        )
    if rank >= world:
        raise ConfigError(f"rank {rank}: expected less than the number of processes, {world}")
    master = environment.get(MASTER) or ("127.0.0.1" if world == 1 else "")
    if not master:
        raise ConfigError(f"{MASTER}: not in the environment; set it to the host of the process of rank 0")
    return Spot(rank, world, master, _gpu(environment))


def settings_of(spot: Spot, config: Config) -> tuple[str, ...]:
    """The settings that follow from the launcher: as many nodes as processes, and each its own GPU of its machine."""
    own = [f"--coordinator.nodes={spot.world}"]
    if config.run.device == "cuda" and spot.gpu is not None:
        own.append(f"--run.device=cuda:{spot.gpu}")
    return tuple(own)


def launch(command: Command, load: Callable[[Sequence[str]], Config], spot: Spot, port: int, interface: str) -> None:
    """Take part in the run as the node of this rank; rank 0 also serves it.

    `load` reads the config with these settings added. Raises `ConfigError` for a mistake, and `RunAborted` where the
    run ends before its last step.
    """
    from node.commands.node import run_node

    settings = settings_of(spot, load([f"--coordinator.nodes={spot.world}"]))
    config = load(settings)
    if config.coordinator.shards > 1:
        raise ConfigError(
            f"coordinator.shards = {config.coordinator.shards}: isthmus launch makes each process a node; start "
            "isthmus coordinator, and each site by torchrun -m node.cli node"
        )
    join = f"tcp://{spot.master}:{port}"
    parse_address(join, MASTER, dial=True)
    await_host(spot.master, config.coordinator.join_timeout_s)
    here = interface or address_towards(spot.master, port)
    if spot.rank:
        run_node(config, join, f"tcp://{here}:0", "", "", spot.rank)
        return
    if spot.world > 1 and _is_loopback(here):
        log.warning("the coordinator listens on %s, which only this machine reaches; for others give --interface", here)
    (config.run.folder / ADDRESS).unlink(missing_ok=True)
    with Children() as children:
        lead = children.start(
            "coordinator", _coordinator(command, [*settings, f"--coordinator.address=tcp://{here}:{port}"])
        )
        _await_listening(lead, config.run.folder / ADDRESS)
        run_node(config, join, f"tcp://{here}:0", "", "", 0)
        lead.wait(config.coordinator.heartbeat_timeout_s)
        if lead.code != 0:
            raise RunAborted("the coordinator did not end in time" if lead.code is None else lead.describe())


def await_host(host: str, limit_s: float) -> None:
    """Wait until `host` has an address: in a cluster, a name appears when its machine or pod does."""
    end_s = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end_s:
                raise ConfigError(f"{MASTER} = {host}: has no address here after {limit_s:g} s ({error})") from None
        time.sleep(RETRY_S)


def address_towards(host: str, port: int, key: str = MASTER) -> str:
    """The address of this machine from which `host` is reached. Nothing is sent. Raises `ConfigError`, naming `key`."""
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.connect(address)
        except OSError as error:
            raise ConfigError(f"{key} = {host}: no way there from here ({error.strerror})") from None
        own = str(probe.getsockname()[0])
    return f"[{own}]" if ":" in own else own


def _coordinator(command: Command, settings: Sequence[str]) -> list[str]:
    preset = ["--preset", command.preset] if command.preset else []
    words = [sys.executable, "-m", "node.cli", "coordinator", str(command.config), *preset]
    return [*words, *command.settings, *settings]


def _await_listening(lead: Child, address: Path) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    while not address.exists():
        if lead.wait(0.05):
            raise ConfigError("the coordinator did not start, for the reason above")
        if time.monotonic() > end_s:
            raise RunAborted(f"the coordinator did not listen within {START_TIMEOUT_S:g} s")


def _gpu(environment: Mapping[str, str]) -> int | None:
    """A launcher may show each process its own GPUs only (Slurm does); they are numbered from 0 on again."""
    place = _number(environment, LOCAL_RANK)
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return place % len(visible) if place is not None and visible else place


def _number(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    for name in names:
        if text := environment.get(name):
            if not (text.isascii() and text.isdigit()):
                raise ConfigError(f"{name} = {text!r}: expected a whole number, 0 or more")
            return int(text)
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in ("lo", "localhost")
