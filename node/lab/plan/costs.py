"""From work to seconds: six named figures, stated for a device or fitted to runs (`node.lab.plan.fit`)."""

from __future__ import annotations

import msgspec
import numpy as np

from netem.errors import ConfigError
from node.lab.plan.devices import Device
from node.lab.plan.work import Array, Work


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's work takes. `cores`: nodes of one machine that share so many cores; 0: each has its own device."""

    flops_per_s: float
    element_s: float = 0.0
    """Of one number through norms, activations, softmax, optimizer. 0: the MFU is meant to cover it."""
    call_s: float = 0.0
    """Of a stage or block, whatever its size."""
    message_s: float = 0.0
    """Of a payload sent or received, whatever its size: handing over between threads, headers, waking up."""
    byte_s: float = 0.0
    """Of a payload byte packed, copied or unpacked by the node."""
    step_s: float = 0.0
    """Of a step, whatever is in it."""
    cores: int = 0

    def seconds(self, work: Work) -> Array:
        """How long the work takes, in the shape of its arrays."""
        seconds: Array = (
            work.flops / self.flops_per_s
            + work.elements * self.element_s
            + work.calls * self.call_s
            + work.messages * self.message_s
            + work.nbytes * self.byte_s
        )
        return seconds

    def slowed(self, factor: float) -> Costs:
        """The same where everything takes `factor` times as long."""
        names = ("element_s", "call_s", "message_s", "byte_s", "step_s")
        changes = {name: getattr(self, name) * factor for name in names}
        return msgspec.structs.replace(self, flops_per_s=self.flops_per_s / factor, **changes)


def stated(device: Device, mfu: float) -> Costs:
    """The device's peak at a stated MFU, and nothing else. Raises `ConfigError` where the MFU is no share."""
    if not (np.isfinite(mfu) and 0 < mfu <= 1):
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak, above 0 and at most 1, such as 0.4")
    return Costs(flops_per_s=device.peak_flops_per_s * mfu)
