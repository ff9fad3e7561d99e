"""The two names of a peer: one for people, and one for the wire.

On the wire a node is called `name~random`. No two processes have the same wire name, even if people gave them the same
name, so a process cannot be mistaken for another or take over its connection. Where peers have keys, the part after the
`~` is a digest of the key (`certified`), so that the name alone is of no use to others. People, profiles and messages
use only the part before the `~`. `netem.endpoint.unique` makes a wire name.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

import msgspec

SEPARATOR = "~"
OPERATOR = "(operator)"
"""The name of the endpoint that changes a running network (`coordinator.operator`). No node can have it."""

KeyText = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40})?$")]
"""A CURVE key, public or secret, as text (Z85); empty is none."""

_NONCE_DIGITS = 8
_DIGEST_BYTES = 12  # 96 bits: to find another key for a name takes 2^96 tries


def plain(peer: str) -> str:
    """The name for people: the part before the `~`, or the whole name if it has none."""
    return peer.partition(SEPARATOR)[0]


def certified(name: str, nonce: str, public_key: str) -> str:
    """The wire name of the process that people call `name`: only the owner of the key can use it.

    The nonce, 8 hex digits, tells processes apart that have the same key one after another.
    """
    assert len(nonce) == _NONCE_DIGITS
    digest = hashlib.blake2b(f"{name}{SEPARATOR}{nonce}{public_key}".encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{name}{SEPARATOR}{nonce}{digest}"


def certifies(peer: str, public_key: str) -> bool:
    """Whether the wire name `peer` belongs to the owner of this key."""
    name, _, suffix = peer.partition(SEPARATOR)
    nonce = suffix[:_NONCE_DIGITS]
    return len(nonce) == _NONCE_DIGITS and hmac.compare_digest(
        certified(name, nonce, public_key).encode(), peer.encode("utf-8", "backslashreplace")
    )
