"""Several hosts in one: a network namespace for each, joined by a bridge, and each NIC shaped both ways by the kernel.

`netem.verify.kernel` is the same for two hosts and one direction, and says what it needs. What a host sends passes the
token bucket of its own device; what it receives passes that of the bridge's port. A hub in the bridge's namespace
reaches all hosts; a coordinator runs there. Without a rate, nothing is shaped.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from netem.errors import IsthmusError
from netem.verify.kernel import bucket_of, iproute, remove_namespaces, shape

_DEVICE, _BRIDGE = "eth0", "bridge"
HUB_HOST = 254


class Host(NamedTuple):
    """A place for processes: the command that starts one there, and its address."""

    prefix: tuple[str, ...]
    address: str


@dataclass(frozen=True)
class Lan:
    """The hosts, and the hub."""

    hosts: tuple[Host, ...]
    hub: Host
    rate_bps: float | None
    buckets: tuple[tuple[str, str], ...]
    """Namespace and device of every token bucket: what host 0 sends, what it receives, and so on."""

    device: str = _DEVICE
    """The name of each host's NIC."""

    def sent_bytes(self) -> list[tuple[int, int]]:
        """Bytes that each host's NIC has sent and received so far. Raises `IsthmusError` where a packet was dropped."""
        counted = [bucket_of(*bucket) for bucket in self.buckets]
        drops = sum(dropped for _, dropped in counted)
        if drops:
            raise IsthmusError(f"the kernel's token buckets dropped {drops} packets, so they are no reference")
        passed = [nbytes for nbytes, _ in counted]
        return list(zip(passed[::2], passed[1::2], strict=True))


@contextmanager
def lan(count: int, rate_bps: float | None) -> Iterator[Lan]:
    """So many hosts, each with a NIC of `rate_bps` up and down. Raises `IsthmusError` with the tool's message."""
    name = f"isthmus-{secrets.token_hex(3)}"
    hub, hosts = f"{name}-hub", [f"{name}-{place}" for place in range(count)]
    subnet = f"10.{128 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
    buckets: list[tuple[str, str]] = []
    try:
        iproute("ip", "netns", "add", hub)
        iproute("ip", "-n", hub, "link", "add", _BRIDGE, "type", "bridge")
        iproute("ip", "-n", hub, "addr", "add", f"{subnet}.{HUB_HOST}/24", "dev", _BRIDGE)
        _up(hub, "lo", _BRIDGE)
        for place, host in enumerate(hosts):
            port = f"port{place}"
            iproute("ip", "netns", "add", host)
            iproute("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", _DEVICE, "netns", host)
            iproute("ip", "-n", hub, "link", "set", port, "master", _BRIDGE)
            iproute("ip", "-n", host, "addr", "add", f"{subnet}.{place + 1}/24", "dev", _DEVICE)
            _up(hub, port)
            _up(host, "lo", _DEVICE)
            if rate_bps is not None:
                for bucket in ((host, _DEVICE), (hub, port)):
                    shape(*bucket, rate_bps)
                    buckets.append(bucket)
        yield Lan(
            tuple(Host(_inside(host), f"{subnet}.{place + 1}") for place, host in enumerate(hosts)),
            Host(_inside(hub), f"{subnet}.{HUB_HOST}"),
            rate_bps,
            tuple(buckets),
        )
    finally:
        remove_namespaces(*hosts, hub)


def _up(namespace: str, *devices: str) -> None:
    for device in devices:
        iproute("ip", "-n", namespace, "link", "set", device, "up")


def _inside(namespace: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace)
