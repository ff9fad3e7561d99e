"""Devices as data: peak rate of dense matrix products in the number format of training, and memory.

Figures are from the makers' data sheets, dense (not sparse): bfloat16 with float32 accumulation on GPUs. `cpu` is one
core with AVX-512 in float32, in round figures from no data sheet; `isthmus plan --fit` measures a real one. The share
of the peak that a training step reaches (MFU) does not belong to a device; it is given separately.
"""

from __future__ import annotations

from typing import NamedTuple

from netem.errors import ConfigError


class Device(NamedTuple):
    """A device on which a node computes."""

    name: str
    peak_flops_per_s: float
    memory_bytes: float
    half_width: bool
    """True where activations are in bfloat16 (autocast), false where they are in float32."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 80e9, True),  # SXM4, 80 GB
        Device("a100-40gb", 312e12, 40e9, True),
        Device("h100", 989e12, 80e9, True),  # SXM5
        Device("h200", 989e12, 141e9, True),
        Device("b200", 2250e12, 180e9, True),
        Device("l40s", 362e12, 48e9, True),
        Device("4090", 165e12, 24e9, True),
        Device("3090", 71e12, 24e9, True),
        Device("cpu", 0.1e12, 16e9, False),
    )
}


def device(name: str) -> Device:
    """The device of this name. Raises `ConfigError` where there is none."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: no such device; there are {', '.join(DEVICES)}")
    return DEVICES[name]
