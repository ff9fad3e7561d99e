"""Devices as data: peak rate of dense matrix products in the number format of training, and memory.

Figures are from the makers' data sheets, dense (not sparse): bfloat16 with float32 accumulation on GPUs. `cpu` is one
core with AVX-512 in float32, in round figures from no data sheet; `isthmus plan --fit` measures a real one. Devices of
one machine send to each other over NVLink, one way, or over 16 lanes of PCIe 4.0 where that is usual; cores through
memory, in a round figure. The share of the peak that a training step reaches (MFU) does not belong to a device: the
planner is told it, and a run measures it (`node.worker.meter`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from netem.errors import ConfigError


class Device(NamedTuple):
    """A device on which a node computes."""

    name: str
    peak_flops_per_s: float
    memory_bytes: float
    half_width: bool
    """True where activations are in bfloat16 (autocast), false where they are in float32."""
    inside_bps: float = 0.0
    """The rate at which it sends to another device of its machine; 0: that takes no time."""
    named: str = ""
    """A pattern for the name that CUDA has for it; empty where no name says that the peak is this one."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 80e9, True, 2.4e12, r"\bA100\b"),  # SXM4 or PCIe, 80 GB
        Device("a100-40gb", 312e12, 40e9, True, 2.4e12),
        Device("h100", 989e12, 80e9, True, 3.6e12, r"\bH100\b(?!.*(PCIe|NVL))"),  # SXM5
        Device("h200", 989e12, 141e9, True, 3.6e12, r"\bH200\b(?!.*NVL)"),
        Device("b200", 2250e12, 180e9, True, 7.2e12, r"\bB200\b"),
        Device("l40s", 362e12, 48e9, True, 256e9, r"\bL40S\b"),
        Device("4090", 165e12, 24e9, True, 256e9, r"\bRTX 4090$"),
        Device("3090", 71e12, 24e9, True, 256e9, r"\bRTX 3090$"),
        Device("cpu", 0.1e12, 16e9, False, 80e9),
    )
}


def device(name: str) -> Device:
    """The device of this name. Raises `ConfigError` where there is none."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: no such device; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def peak_of(cuda_name: str) -> float | None:
    """Peak FLOPs/s of the GPU that CUDA calls `cuda_name`, such as "NVIDIA A100-SXM4-80GB"; None where the table does
    not have it (the PCIe form of an H100 is slower than the SXM form, for instance)."""
    for known in DEVICES.values():
        if known.named and re.search(known.named, cuda_name):
            return known.peak_flops_per_s
    return None


def devices(names: str, nodes: int) -> tuple[Device, ...]:
    """The device of each node, from one name, or from as many as there are nodes, with commas between them.

    Raises `ConfigError` for an unknown name or another number of them.
    """
    found = [device(name.strip()) for name in names.split(",")]
    if len(found) not in (1, nodes):
        raise ConfigError(f"--device {names}: {len(found)} devices; expected 1, or {nodes}, one for each node")
    return tuple(found if len(found) == nodes else found * nodes)


def default_device(computes_on: str) -> str:
    """The device that is assumed where `run.device` is all that is known: a100 for cuda, else cpu."""
    return "a100" if computes_on.startswith("cuda") else "cpu"


def mix(each: Sequence[Device]) -> str:
    """The devices of all nodes by name: "a100", or "a100, 4090 × 2"."""
    counts = Counter(one.name for one in each)
    if len(counts) == 1:
        return each[0].name
    return ", ".join(name if count == 1 else f"{name} × {count}" for name, count in counts.items())
