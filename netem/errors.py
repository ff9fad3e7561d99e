"""The errors of Isthmus, with a class for each kind of cause.

Everything that a user, a peer or the network can cause is an `IsthmusError` and is shown as one line. Bugs of Isthmus
itself are assertions, and keep their traceback.
"""

from __future__ import annotations

from netem.names import plain


class IsthmusError(Exception):
    """Base of every error that is reported without a traceback (exit code 1 unless a subclass says otherwise)."""


class ConfigError(IsthmusError, ValueError):
    """A user's mistake (exit code 2). The message names the key, the value, and what was expected."""


class ProtocolError(IsthmusError):
    """A peer sent something that the protocol does not allow. `peer` is its name on the wire."""

    def __init__(self, message: str, *, peer: str = "", generation: int | None = None) -> None:
        where = f"{plain(peer)}: " if peer else ""
        when = f" (generation {generation})" if generation is not None else ""
        super().__init__(f"{where}{message}{when}")
        self.peer = peer
        self.generation = generation


class RunAborted(IsthmusError):
    """The run ended before its last step. The message says why, and names the nodes that were lost."""


class GenerationOver(IsthmusError):
    """The membership has changed: work that was under way in the older generation cannot be finished."""


class PeerLate(IsthmusError):
    """This node waits in vain for `peer`, which sends nothing or takes nothing."""

    def __init__(self, peer: str, message: str) -> None:
        super().__init__(message)
        self.peer = peer


class QueueFull(IsthmusError):
    """The send queue is full, because the network is slower than the sender. The call may be repeated later."""


class NotAdmitted(IsthmusError):
    """A peer that was dialled ends every handshake: it does not accept this endpoint's key, or has another one."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"{plain(peer)} ends every handshake: it does not accept this side's key, or has another one")
        self.peer = peer


class PeerSilent(IsthmusError):
    """A peer owes an acknowledgement and has not been heard for longer than the deadline."""

    def __init__(self, peer: str, silent_s: float) -> None:
        super().__init__(
            f"{plain(peer)} has not answered for {silent_s:g} s: its process is gone, hangs, or cannot be reached"
        )
        self.peer = peer
