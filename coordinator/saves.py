"""Which members have saved their part of which checkpoint. A small machine without I/O, used by `run`."""

from __future__ import annotations

from collections.abc import Iterable

from netem.errors import ProtocolError

MOST_UNFINISHED = 16
"""Checkpoints of which parts are noted. Where a node's disk is full, none of them will be complete."""


class Saves:
    """The checkpoints of which some parts are saved and others are not.

    `kept` are the steps of complete ones, of which the last `keep_last` are to stay; 0 keeps all.
    """

    def __init__(self, keep_last: int = 0, kept: Iterable[int] = ()) -> None:
        self._keep_last = keep_last
        self._kept = sorted(kept)
        self._peers: dict[int, set[str]] = {}

    @property
    def oldest_kept(self) -> int:
        """The step of the oldest checkpoint that is to stay. Those before it may be removed."""
        return self._kept[-self._keep_last] if 0 < self._keep_last <= len(self._kept) else 0

    def drop_parts(self) -> None:
        """Another generation begins: parts of members of the one before do not fit those that will come."""
        self._peers.clear()

    def note(self, peer: str, step: int, members: Iterable[str]) -> bool:
        """Note one member's part. True where all of `members` have now saved theirs. Raises `ProtocolError` for a part
        that was noted already."""
        peers = self._peers.setdefault(step, set())
        if peer in peers:
            raise ProtocolError(f"saved step {step} twice", peer=peer)
        peers.add(peer)
        if not set(members) <= peers:
            self._peers.pop(min(self._peers) if len(self._peers) > MOST_UNFINISHED else -1, None)
            return False
        for older in [older for older in self._peers if older <= step]:
            del self._peers[older]  # an older checkpoint that is not complete by now never will be
        self._kept = [*(one for one in self._kept if one < step), step]
        return True
