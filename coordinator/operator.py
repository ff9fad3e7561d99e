"""A person's requests to the coordinator of a running run, each with one answer within a time limit.

They change or describe the run's network (`live`), or ask for what the run has recorded. The endpoint is not part of
the emulated network, so cuts do not affect it.
"""

from __future__ import annotations

import queue
from typing import TypeVar

from coordinator.keyring import OperatorKeys
from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    PROTOCOL_VERSION,
    RUN_ID,
    Answer,
    Ask,
    Refused,
    Watch,
    Watched,
    control_buffer,
    decode_from_coordinator,
    encode,
)
from netem.changes import Change
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, IsthmusError, NotAdmitted, ProtocolError
from netem.keys import Access, pair_of
from netem.limits import Limits
from netem.names import OPERATOR
from netem.network import UNSHAPED

_Kind = TypeVar("_Kind", Answer, Watched)

TIMEOUT_S = 15.0


class Operator:
    """A connection to the coordinator at `address`. Close it, or use it as a context.

    Its methods raise `ConfigError` where no coordinator answers there within `timeout_s`, or it refuses.
    """

    def __init__(self, address: str, keys: OperatorKeys, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._inbox = _Inbox()
        pair = pair_of(keys.secret)
        name, limits = unique(OPERATOR, pair.public), Limits(max_strangers=0)
        self._endpoint = Endpoint(name, RUN_ID, UNSHAPED, self._inbox, bind=None, limits=limits, access=Access(pair))
        self._endpoint.connect(COORDINATOR, address, answers_only=True, key=keys.coordinator)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._endpoint.close()

    def ask(self, change: Change | None) -> Answer:
        """Change the run's network, or only describe it."""
        return self._exchange(Ask(version=PROTOCOL_VERSION, change=change), Answer)

    def watch(self, after: int) -> Watched:
        """What the run has recorded after the line of this number."""
        return self._exchange(Watch(version=PROTOCOL_VERSION, after=after), Watched)

    def _exchange(self, question: Ask | Watch, kind: type[_Kind]) -> _Kind:
        self._endpoint.send(COORDINATOR, CONTROL_TAG, [encode(question)], urgent=True)
        try:
            message = self._inbox.said.get(timeout=self._timeout_s)
        except queue.Empty:
            raise ConfigError(
                f"nobody answers at {self._address}; is the run going on, and is that its address?"
            ) from None
        if isinstance(message, NotAdmitted):
            where = f"the coordinator at {self._address}"
            raise ConfigError(f"{where} does not accept this key; is it that of the run there?")
        if isinstance(message, IsthmusError):
            raise message
        if isinstance(message, Refused):
            raise ConfigError(f"the coordinator refuses: {message.reason}")
        if not isinstance(message, kind):
            raise ProtocolError(f"a {type(message).__name__} in answer to a {type(question).__name__}")
        return message


def ask(address: str, keys: OperatorKeys, change: Change | None) -> Answer:
    """Change the network of the run whose coordinator is at `address`, or only describe it."""
    with Operator(address, keys) as operator:
        return operator.ask(change)


class _Inbox:
    """A `netem.endpoint.Receiver` for answers."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Answer | Watched | Refused | IsthmusError] = queue.SimpleQueue()

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return control_buffer(tag, total_bytes, peer)

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        try:
            message = decode_from_coordinator(buffer)
        except ProtocolError as error:
            self.said.put(error)
            return
        if isinstance(message, Answer | Watched | Refused):
            self.said.put(message)

    def failed(self, error: IsthmusError) -> None:
        self.said.put(error)
