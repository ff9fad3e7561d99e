"""Whose part of which checkpoint is on disk. A small machine without I/O; `run` says when one is complete."""

from __future__ import annotations

from collections.abc import Iterable

from netem.errors import ProtocolError


class Saves:
    """The checkpoints that some members have saved, and not all."""

    def __init__(self) -> None:
        self._peers: dict[int, set[str]] = {}

    def note(self, peer: str, step: int, world: Iterable[str]) -> bool:
        """Note one member's part. True where it was the last of `world`. Raises `ProtocolError` for a second time."""
        peers = self._peers.setdefault(step, set())
        if peer in peers:
            raise ProtocolError(f"saved step {step} twice", peer=peer)
        peers.add(peer)
        if peers != set(world):
            return False
        for older in [older for older in self._peers if older <= step]:
            del self._peers[older]  # an older one that is not complete by now never will be
        return True
