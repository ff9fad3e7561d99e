"""A network as a reference: two network namespaces, a veth pair, and the kernel's token bucket (`tc-tbf`).

It needs Linux, root and iproute2; `unavailable` tries it and says what is missing. All parts have new names, and are
removed when the `with` ends: to delete a namespace deletes its end of the pair too. Only a SIGKILL leaves them behind;
`ip netns list` then shows names that begin with isthmus-.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from netem.errors import IsthmusError
from netem.units import format_rate
from netem.verify.promise import Promise

_TIMEOUT_S = 10.0
_LEAST_BURST_BYTES = 16_000
_BURST_S = 0.002  # how late the kernel's timer may be before the rate suffers
_QUEUE_BYTES = 64_000_000  # more than TCP has in flight, so that nothing is dropped and sent again


@dataclass(frozen=True)
class Kernel:
    """The two namespaces: how to start a process in each, and their addresses."""

    sender: tuple[str, ...]
    receiver: tuple[str, ...]
    sender_host: str
    receiver_host: str
    promise: Promise
    device: str
    """The shaped device, in the namespace of the same name."""

    def sent_bytes(self) -> int:
        """Bytes that the bucket has let through so far, with headers down to Ethernet's."""
        sent_bytes, drops = bucket_of(self.device, self.device)
        if drops:
            raise IsthmusError(f"the kernel's token bucket dropped {drops} packets, so it is no reference")
        return sent_bytes


def unavailable() -> str | None:
    """Why the kernel's reference cannot be had here, or None if it can. It is set up and removed to find out."""
    if platform.system() != "Linux":
        return f"kernel tbf needs Linux; this is {platform.system()}"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"kernel tbf needs iproute2: there is no command {tool!r}"
    if os.geteuid() != 0:
        return "kernel tbf needs root, for network namespaces"
    try:
        with kernel(1e9) as built:
            built.sent_bytes()
    except IsthmusError as error:
        return f"kernel tbf cannot be set up: {error}"
    return None


@contextmanager
def kernel(rate_bps: float) -> Iterator[Kernel]:
    """Two namespaces, shaped from the first to the second. Raises `IsthmusError` with the tool's message."""
    name = f"isthmus-{secrets.token_hex(3)}"  # a device's name has at most 15 characters
    source, target = f"{name}a", f"{name}b"
    subnet = f"10.{128 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
    try:
        iproute("ip", "netns", "add", source)
        iproute("ip", "netns", "add", target)
        iproute("ip", "-n", source, "link", "add", source, "type", "veth", "peer", "name", target, "netns", target)
        for end, host in ((source, 1), (target, 2)):
            iproute("ip", "-n", end, "addr", "add", f"{subnet}.{host}/30", "dev", end)
            iproute("ip", "-n", end, "link", "set", end, "up")
        shape(source, source, rate_bps)
        yield Kernel(
            ("ip", "netns", "exec", source),
            ("ip", "netns", "exec", target),
            f"{subnet}.1",
            f"{subnet}.2",
            Promise(rate_bps, 0.0, burst_of(rate_bps)),
            source,
        )
    except IsthmusError as error:
        raise IsthmusError(f"{format_rate(rate_bps)}: {error}") from None
    finally:
        remove_namespaces(source, target)


def shape(namespace: str, device: str, rate_bps: float) -> None:
    """Give a device a token bucket for what it sends. Raises `IsthmusError` with the tool's message."""
    iproute(
        *("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf"),
        *("rate", f"{round(rate_bps)}bit", "burst", f"{burst_of(rate_bps)}b", "limit", f"{_QUEUE_BYTES}b"),
    )


def bucket_of(namespace: str, device: str) -> tuple[int, int]:
    """Bytes that the device's token bucket has let through, with headers down to Ethernet's, and packets dropped."""
    shown = json.loads(iproute("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device))
    bucket = next(entry for entry in shown if entry["kind"] == "tbf")
    return int(bucket["bytes"]), int(bucket["drops"])


def burst_of(rate_bps: float) -> int:
    """Bytes that the bucket lets through at once after a rest."""
    return max(_LEAST_BURST_BYTES, round(rate_bps / 8 * _BURST_S))


def remove_namespaces(*names: str) -> None:
    """Delete namespaces, and their devices with them; those that do not exist are passed over."""
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=_TIMEOUT_S, check=False)


def iproute(*command: str) -> str:
    """Run `ip` or `tc`; what it prints. Raises `IsthmusError` with its message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IsthmusError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise IsthmusError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
