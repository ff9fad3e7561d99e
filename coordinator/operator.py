"""A person's request to the coordinator of a running run: one question and one answer, within a time limit.

It changes or describes the run's network (`live`). Its endpoint is not part of the emulated network, so cuts do not
affect it.
"""

from __future__ import annotations

import queue

from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    PROTOCOL_VERSION,
    RUN_ID,
    Answer,
    Ask,
    Refused,
    control_buffer,
    decode_from_coordinator,
    encode,
)
from netem.changes import Change
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, IsthmusError, ProtocolError
from netem.limits import Limits
from netem.names import OPERATOR
from netem.network import UNSHAPED


def ask(address: str, token: str, change: Change | None, timeout_s: float = 15.0) -> Answer:
    """Change the network of the run whose coordinator is at `address`, or only describe it.

    Raises `ConfigError` where no coordinator answers there, or it refuses.
    """
    inbox = _Inbox()
    endpoint = Endpoint(unique(OPERATOR), RUN_ID, UNSHAPED, inbox, bind=None, limits=Limits(max_strangers=0))
    try:
        endpoint.connect(COORDINATOR, address, answers_only=True)
        question = Ask(token=token, version=PROTOCOL_VERSION, change=change)
        endpoint.send(COORDINATOR, CONTROL_TAG, [encode(question)], urgent=True)
        message = inbox.said.get(timeout=timeout_s)
    except queue.Empty:
        raise ConfigError(f"nobody answers at {address}; is the run going on, and is that its address?") from None
    finally:
        endpoint.close()
    if isinstance(message, IsthmusError):
        raise message
    if isinstance(message, Refused):
        raise ConfigError(f"the coordinator refuses: {message.reason}")
    return message


class _Inbox:
    """A `netem.endpoint.Receiver` for one answer."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Answer | Refused | IsthmusError] = queue.SimpleQueue()

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return control_buffer(tag, total_bytes, peer)

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        try:
            message = decode_from_coordinator(buffer)
        except ProtocolError as error:
            self.said.put(error)
            return
        if isinstance(message, Answer | Refused):
            self.said.put(message)

    def failed(self, error: IsthmusError) -> None:
        self.said.put(error)
