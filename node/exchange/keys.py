"""The names by which a node waits for what others send: values only."""

from __future__ import annotations

from typing import NamedTuple


class ChunkKey(NamedTuple):
    """One expected payload: its pass, layer, chunk, and the rank that it comes from, though others may pass it on."""

    kind: str
    pass_no: int
    layer: int
    chunk: int
    rank: int
    piece: int = 0

    @property
    def whole(self) -> ChunkKey:
        """The payload that this is a piece of."""
        return self._replace(piece=0)


class RingKey(NamedTuple):
    """One expected shard of an averaging round."""

    round_id: int
    hop: int
    bucket: int


Key = ChunkKey | RingKey
