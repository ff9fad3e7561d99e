"""The processes of a measurement, from the side of their parent.

`Party` is one `netem.verify.child`, which has ended when its `with` ends, whatever happened in it. `busy_cores` keeps
all cores busy with other work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

import msgspec

from netem.children import Children
from netem.errors import IsthmusError
from netem.profile import Profile
from netem.verify.child import Answer, Command, Connect, Done, Failed, Open, Opened, Part, Transfer, Transferred

Kind = Literal["endpoint", "tcp"]

_PATIENCE_S = 30.0


class Party:
    """One process that carries messages. `prefix` is a command that starts it, such as in a network namespace; `module`
    is its program."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        profile: Profile,
        largest_bytes: int,
        *,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        module: str = "netem.verify.child",
    ) -> None:
        self.name = name
        self._children = Children()
        command = [*prefix, sys.executable, "-m", module, kind]
        try:
            self._process = self._children.start(f"the measuring process {name}", command, talks=True)
            answer = self._ask(Open(name, host, profile, largest_bytes), _PATIENCE_S)
        except BaseException:
            self.close()
            raise
        assert isinstance(answer, Opened)
        self.address = answer.address

    def __enter__(self) -> Party:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, peer: Party, flows: int = 1) -> None:
        """Dial `peer`, and return when it has answered."""
        assert isinstance(self._ask(Connect(peer.name, peer.address, flows), 2 * _PATIENCE_S), Done)

    def begin(self, command: Transfer) -> None:
        """Send the command; `end` returns its answer."""
        self._say(command)

    def end(self, timeout_s: float) -> Transferred:
        """Wait for the transfer that was begun. Raises `IsthmusError` if it failed."""
        answer = self._hear(timeout_s)
        assert isinstance(answer, Transferred)
        return answer

    def close(self) -> None:
        """End the process: by closing its input, and where that does not help, by force."""
        self._children.end()

    def _ask(self, command: Command, timeout_s: float) -> Answer:
        self._say(command)
        return self._hear(timeout_s)

    def _say(self, command: Command) -> None:
        self._process.tell(msgspec.json.encode(command))

    def _hear(self, timeout_s: float) -> Answer:
        line = self._process.hear(timeout_s)
        answer: Answer = msgspec.json.decode(line, type=Answer)
        if isinstance(answer, Failed):
            raise IsthmusError(f"{self.name}: {answer.reason}")
        return answer


def run_transfer(
    sends: dict[str, list[Part]], parties: Sequence[Party], timeout_s: float, *, lead_s: float = 0.02
) -> tuple[float, dict[str, Transferred]]:
    """Make all `sends` (by sender's name) at the same moment; return that moment, and each party's result."""
    at = time.monotonic() + lead_s
    for party in parties:
        receives = [
            Part(source, part.flow, part.nbytes, part.count)
            for source, parts in sends.items()
            for part in parts
            if part.peer == party.name
        ]
        party.begin(Transfer(at, sends.get(party.name, []), receives, timeout_s))
    answers = {party.name: party.end(2 * timeout_s + _PATIENCE_S) for party in parties}
    for name, answer in answers.items():
        if answer.resent_bytes:
            raise IsthmusError(f"{name}: {answer.resent_bytes} bytes were sent twice, though this host loses none")
    return at, answers


@contextmanager
def busy_cores() -> Iterator[None]:
    """Within the `with`, each core of this machine has a process that computes without a pause."""
    command = [sys.executable, "-m", "netem.verify.child", "busy"]
    with Children() as workers:
        for core in range(os.cpu_count() or 1):
            workers.start(f"busy process {core}", command)
        time.sleep(1.0)  # by now they have imported what they do not need, and compute
        yield
