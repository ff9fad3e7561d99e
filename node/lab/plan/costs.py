"""From work to seconds: six figures, assumed for a device or fitted to runs (`node.lab.plan.fit`)."""

from __future__ import annotations

import msgspec
import numpy as np

from netem.errors import ConfigError
from node.lab.plan.work import Array, Work
from node.measure.devices import Device


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
    cores: int = 0
    """Cores that all nodes share; 0 where each node has a device of its own."""

    def seconds(self, work: Work) -> Array:
        """Duration of the work, in the shape of its arrays."""
        seconds: Array = (
            work.flops / self.flops_per_s
            + work.elements * self.element_s
            + work.calls * self.call_s
            + work.messages * self.message_s
            + work.nbytes * self.byte_s
        )
        return seconds

    def slowed(self, factor: float) -> Costs:
        """Costs of a device that takes `factor` times as long for everything."""
        names = ("element_s", "call_s", "message_s", "byte_s", "step_s")
        changes = {name: getattr(self, name) * factor for name in names}
        return msgspec.structs.replace(self, flops_per_s=self.flops_per_s / factor, **changes)


def stated(device: Device, mfu: float) -> Costs:
    """The device's peak times an assumed MFU, with no other costs. Raises `ConfigError` where the MFU is no share."""
    if not (np.isfinite(mfu) and 0 < mfu <= 1):
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak, above 0 and at most 1, such as 0.4")
    return Costs(flops_per_s=device.peak_flops_per_s * mfu)
