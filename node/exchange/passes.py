"""What one pass over the model is, and how it is named: values only, without torch and without state.

The handle of a pass that is under way is `node.exchange.chunks.Pass`.
"""

from __future__ import annotations

from typing import NamedTuple


class PassSpec(NamedTuple):
    """One pass over the model: how many tokens its chunks have, and whether layers with a codec compress."""

    tokens: int
    compressed: bool


class PassKey(NamedTuple):
    """One pass of one exchange: its number, the same on every node, and what it is."""

    number: int
    spec: PassSpec
    trains: bool
    """Whether a backward follows."""
