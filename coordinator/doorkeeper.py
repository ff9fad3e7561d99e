"""The coordinator's door: who may call it, who may join under which name, and who may change the network.

ZeroMQ has proved by the time that a message comes which key its sender has, and that its name on the wire belongs to
that key (`netem.porter`). Here the names in messages are held against that. What members must know to prove to each
other that they are members is added to a roster as it leaves, so that nothing else ever holds it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.events import REFUSED_CONNECTIONS, REFUSED_REQUESTS
from coordinator.keyring import OperatorKeys, as_text, coordinator_keys, operator_pair
from coordinator.messages import Ask, CoordinatorMessage, Join, NodeMessage, Roster
from netem.door import DoorCounters, DoorLimits
from netem.keys import Access, derived_secret, new_pair
from netem.names import certifies


class Doorkeeper:
    """Judges who comes, for one run. Raises `ConfigError` where a file of keys cannot be read."""

    def __init__(self, config: CoordinatorConfig, run_name: str) -> None:
        self._refused = 0  # requests
        self._recorded = Counter[str]()  # refusals that the records have
        pair, keys = coordinator_keys(config)
        self._invited = keys.nodes if keys else None
        self.shared = derived_secret(pair, f"members of {run_name}")
        """By this, members prove to each other that they are members."""
        self.operator_file: str | None = None
        """The operator's key as a file's text, if it was made here and nobody else has it."""
        if keys:
            self._operator = keys.operator
        elif config.operator:
            self._operator = operator_pair(config.operator).public
        else:
            drawn = new_pair()
            self._operator = drawn.public
            self.operator_file = as_text(OperatorKeys(coordinator=pair.public, secret=drawn.secret))
        invited = None if keys is None else frozenset({*keys.nodes.values(), keys.operator})
        self.access = Access(pair, encrypts=True, invited=invited)
        # Every node may dial at the same time.
        nodes = config.layout.processes
        self.limits = DoorLimits(most_new=64 + 2 * nodes, most_new_of_a_source=32 + 2 * nodes, most=128 + 4 * nodes)

    def refusal(self, peer: str, message: NodeMessage) -> str | None:
        """Why the sender, a stranger, gets no further answer; None where it gets one."""
        reason = self._refusal(peer, message)
        self._refused += reason is not None
        return reason

    def newly_refused(self, connections: DoorCounters | None) -> dict[str, float]:
        """What was refused since the last call, as metrics; nothing where that is 0."""
        refused = connections.refused if connections else 0
        now = Counter({REFUSED_CONNECTIONS: refused, REFUSED_REQUESTS: self._refused})
        new, self._recorded = now - self._recorded, now
        return {key: float(count) for key, count in new.items()}

    def _refusal(self, peer: str, message: NodeMessage) -> str | None:
        if isinstance(message, Ask) and not certifies(peer, self._operator):
            return (
                "this command does not have the operator's secret of this run; give --coordinator the run's folder "
                "on the coordinator's machine, or the operator's key with --key FILE or ISTHMUS_OPERATOR"
            )
        if isinstance(message, Join):
            return self.imposture(peer, message.name, message.key)
        return None

    def imposture(self, peer: str, name: str, key: str) -> str | None:
        """Why the sender may not join under this name with this key; None where it may."""
        if not certifies(peer, key):
            return f"{name} did not come with the key that it names"
        if self._invited is not None and self._invited.get(name) != key:
            return f"this invitation is not for the name {name}; leave --name out"
        return None

    def welcome(self, name: str, key: str) -> None:
        """Let one more in under this name, besides those that have an invitation."""
        if self._invited is not None and self.access.invited is not None:
            self._invited = {**self._invited, name: key}
            self.access = replace(self.access, invited=self.access.invited | {key})

    def sealed(self, message: CoordinatorMessage) -> CoordinatorMessage:
        """The message as it leaves."""
        return msgspec.structs.replace(message, secret=self.shared) if isinstance(message, Roster) else message
