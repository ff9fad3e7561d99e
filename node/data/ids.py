"""Token ids as arrays: how wide they are on disk, and which of them exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32, little-endian, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as plain numbers. Raises `ValueError` for one that does not exist."""
    plain = [int(i) for i in ids]
    for i in plain:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token {i}: expected 0 to {vocab_size - 1}")
    return plain
