"""One seed, many streams: every random choice draws from its own stream, named by what it is for."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: object) -> int:
    """A 63-bit seed for the stream that `labels` name, the same on every node and in every run of `seed`."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
