"""Which weights are averaged together: fragments by layer strides (Streaming DiLoCo, arXiv 2501.18512). No torch here.

Of P fragments the first has layers 0, P, 2P and so on, the second has layers 1, P + 1 and so on. Neighbouring layers
are so averaged at different steps. Weights that belong to no layer go, one after another, to the fragment that is then
the smallest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LAYER = re.compile(r"layers\.(\d+)\.")


def cut(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The names in `sizes`, which gives each one's number of elements, by fragment; in each in their order there."""
    fragment_of: dict[str, int] = {}
    totals = [0] * count
    for name, size in sizes.items():
        if match := _LAYER.match(name):
            fragment_of[name] = int(match[1]) % count
            totals[fragment_of[name]] += size
    for name, size in sizes.items():
        if name not in fragment_of:
            fragment_of[name] = totals.index(min(totals))
            totals[fragment_of[name]] += size
    return [[name for name in sizes if fragment_of[name] == index] for index in range(count)]
