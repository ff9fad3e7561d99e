"""What this machine is: versions, what it computes on, and what room it has."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from coordinator.survey.messages import Facts
from netem import cores
from node.config import Config

SHORT_TOKEN = 16
"""Characters. Tokens can be tried at leisure by who has recorded a handshake (SECURITY.md)."""
_ASK_S = 15.0


def facts_of(config: Config, host: str) -> Facts:
    """This machine, which listens at `host`, an address or an interface."""
    import torch  # takes seconds

    memory = psutil.virtual_memory()
    gpu, driver = _nvidia()
    cuda = torch.version.cuda or ""
    gpu_bytes = 0
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_bytes = properties.name, properties.total_memory
    token = config.coordinator.token
    return Facts(
        release=_release(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores.share(),
        shared_cores=cores.name(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        free_disk_bytes=_free_disk_bytes(config.run.folder),
        device=config.run.device,
        gpu=gpu[:200],
        gpu_bytes=gpu_bytes,
        driver=driver[:50],
        cuda=cuda if torch.cuda.is_available() else "",
        interface=_interface(host),
        short_token=bool(token) and len(token) < SHORT_TOKEN,
    )


def _release() -> str:
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return ""


def _nvidia() -> tuple[str, str]:
    """The first GPU and its driver, as the driver's own tool says; empty where there is none. torch may be a build that
    sees no GPU."""
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_ASK_S, check=False)
        if done.returncode == 0 and done.stdout.strip():
            name, _, driver = done.stdout.splitlines()[0].rpartition(",")
            return name.strip(), driver.strip()
    return "", ""


def _free_disk_bytes(folder: Path) -> int:
    """Of the disk that a run would write to; its folder need not exist yet."""
    with suppress(OSError):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free
    return 0


def _interface(host: str) -> str:
    """The name of the interface that has this address, with its rate where the driver tells: "eth0, 1000 Mbit/s"."""
    host = host.strip("[]")
    found = psutil.net_if_addrs()
    names = [name for name, known in found.items() if name == host or any(one.address == host for one in known)]
    if not names:
        return ""
    parts = [names[0]]
    if sys.platform == "linux" and Path("/sys/class/net", names[0], "wireless").exists():
        parts.append("wireless")
    stats = psutil.net_if_stats().get(names[0])
    if stats is not None and stats.speed:
        parts.append(f"{stats.speed} Mbit/s")
    return ", ".join(parts)
