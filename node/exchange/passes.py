"""What one pass over the model is."""

from __future__ import annotations

from typing import NamedTuple


class PassSpec(NamedTuple):
    """One pass over the model: how many tokens its chunks have, and whether layers with a codec compress."""

    tokens: int
    compressed: bool
