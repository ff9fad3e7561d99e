"""What a node computes on: its peak rate, where that is known, its share of the cores, and the memory that it has used
at most."""

from __future__ import annotations

import logging
import resource
import sys

import torch

from coordinator.messages import Roster
from netem import cores
from node.measure.devices import peak_of

log = logging.getLogger("isthmus.node")

_MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class Machine:
    """The device that this node computes on. `peak_flops_per_s` is None for CPUs and for GPUs that are not known."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gpu = device.type == "cuda"
        self.peak_flops_per_s = peak_of(torch.cuda.get_device_name(device)) if gpu else None

    @property
    def memory_bytes(self) -> float:
        """The memory of the GPU; 0 where this computes on a CPU, whose memory others share."""
        gpu = self._device.type == "cuda"
        return float(torch.cuda.get_device_properties(self._device).total_memory) if gpu else 0.0

    def memory_peak_bytes(self) -> float:
        """The most memory so far: of tensors on the GPU, or of the whole process where it computes on a CPU."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT_BYTES)


def share_cores(threads: int, rank: int, roster: Roster, processes: int = 1) -> None:
    """Set the number of torch's threads: `threads`, or where that is 0, this member's share of the cores that it has
    together with others. More threads than cores would wait for each other in every operation. Each of the members
    stands for the `processes` of its site."""
    names = {member.rank: member.cores for member in roster.members}
    sharers = list(names.values()).count(names[rank]) * processes
    threads = threads or cores.share(sharers)
    torch.set_num_threads(threads)
    log.info("%d threads; %d of the nodes run on these cores", threads, sharers)
