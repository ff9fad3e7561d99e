"""From work to seconds: six figures, assumed for a device or fitted to runs (`node.lab.plan.fit`)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from netem.errors import ConfigError
from node.config import Config
from node.lab.plan.work import Array, Work
from node.measure.devices import Device

MFU = 0.4
"""The share of its peak that a device reaches in a well-made step; assumed by default."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """How long each kind of a node's work takes."""

    flops_per_s: float
    element_s: float = 0.0
    """Seconds for each number that passes norms, activations, softmax or the optimizer; 0 where the MFU covers it."""
    call_s: float = 0.0
    """Fixed seconds for each stage or block."""
    message_s: float = 0.0
    """Fixed seconds for each payload sent or received: passing it between threads, headers, waking up."""
    byte_s: float = 0.0
    """Seconds for each payload byte that the node packs, copies or unpacks."""
    step_s: float = 0.0
    """Fixed seconds for each step."""
    cores: float = 0
    """Cores that all nodes share; 0 where each node has a device of its own."""
    inside_bps: float = 0
    """The rate at which one device of a node sends to another; 0 where that takes no time."""
    speeds: tuple[float, ...] = ()
    """Speed of each rank, where 1 is what the other figures say; empty: all are alike."""

    def seconds(self, work: Work) -> Array:
        """Duration of the work, [R] or [C, R] as its arrays are."""
        seconds: Array = (
            work.flops / self.flops_per_s
            + work.elements * self.element_s
            + work.calls * self.call_s
            + work.messages * self.message_s
            + work.nbytes * self.byte_s
        )
        return seconds / np.array(self.speeds) if self.speeds else seconds

    def inside_s(self, nbytes: float) -> float:
        """Seconds of bytes from one device of a node to another."""
        return 8 * nbytes / self.inside_bps if self.inside_bps else 0.0

    def alike(self) -> Costs:
        """Costs of nodes that all have the mean speed."""
        return msgspec.structs.replace(self, speeds=())

    def at_rates(self, rates: Sequence[float]) -> Costs:
        """The same costs for nodes whose speeds are to each other as these rates; their mean is the speed so far."""
        mean = sum(rates) / len(rates)
        same = max(rates) == min(rates)
        return msgspec.structs.replace(self, speeds=() if same else tuple(rate / mean for rate in rates))

    def slowed(self, factor: float) -> Costs:
        """Costs of a device that takes `factor` times as long for everything."""
        names = ("element_s", "call_s", "message_s", "byte_s", "step_s")
        changes = {name: getattr(self, name) * factor for name in names}
        return msgspec.structs.replace(self, flops_per_s=self.flops_per_s / factor, **changes)


def stated(device: Device, mfu: float) -> Costs:
    """The device's peak times an assumed MFU, and its rate to its neighbours, with no other costs. Raises `ConfigError`
    where the MFU is no share."""
    if not (np.isfinite(mfu) and 0 < mfu <= 1):
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak, above 0 and at most 1, such as 0.4")
    return Costs(flops_per_s=device.peak_flops_per_s * mfu, inside_bps=device.inside_bps)


def stated_for(config: Config, devices: Sequence[Device], mfu: float = MFU) -> Costs:
    """The speeds that the config states (`coordinator.node_speeds`), otherwise the rank's devices at an assumed MFU."""
    rates = [1e12 * speed for speed in config.coordinator.node_speeds]
    rates = rates or [stated(device, mfu).flops_per_s for device in devices]
    inside_bps = min(device.inside_bps for device in devices)
    return Costs(flops_per_s=sum(rates) / len(rates), inside_bps=inside_bps).at_rates(rates)
