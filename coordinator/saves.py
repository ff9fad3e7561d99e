"""Which members have saved their part of which checkpoint. A small machine without I/O, used by `run`."""

from __future__ import annotations

from collections.abc import Iterable

from netem.errors import ProtocolError


class Saves:
    """The checkpoints of which some parts are saved and others are not."""

    def __init__(self) -> None:
        self._peers: dict[int, set[str]] = {}

    def note(self, peer: str, step: int, members: Iterable[str]) -> bool:
        """Note one member's part. True where all of `members` have now saved theirs. Raises `ProtocolError` for a part
        that was noted already."""
        peers = self._peers.setdefault(step, set())
        if peer in peers:
            raise ProtocolError(f"saved step {step} twice", peer=peer)
        peers.add(peer)
        if peers != set(members):
            return False
        for older in [older for older in self._peers if older <= step]:
            del self._peers[older]  # an older checkpoint that is not complete by now never will be
        return True
