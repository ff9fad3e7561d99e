"""What a node computes on: its peak rate, where that is known, and the memory that it has used at most."""

from __future__ import annotations

import resource
import sys

import torch

from node.measure.devices import peak_of

_MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class Machine:
    """The device that this node computes on. `peak_flops_per_s` is None for CPUs and for GPUs that are not known."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gpu = device.type == "cuda"
        self.peak_flops_per_s = peak_of(torch.cuda.get_device_name(device)) if gpu else None

    def memory_peak_bytes(self) -> float:
        """The most memory so far: of tensors on the GPU, or of the whole process where it computes on a CPU."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT_BYTES)
