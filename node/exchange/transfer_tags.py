"""The messages of a transfer of a node's state (`node.train.transfer`), as tags of netem messages. No I/O."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MOST_WANTED = 64
"""Pieces that are asked for in one message, at most."""

Number = Annotated[int, Meta(ge=0, le=1 << 53)]


# From the joiner:


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask", forbid_unknown_fields=True):
    """A request for the catalogue of the state after `step` steps."""

    step: Number


class Want(msgspec.Struct, frozen=True, array_like=True, tag="want", forbid_unknown_fields=True):
    """A request for pieces of the catalogue that the donor has sent."""

    pieces: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=MOST_WANTED)]


# From the donor:


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer", forbid_unknown_fields=True):
    """The catalogue, which is the message's payload."""


class Piece(msgspec.Struct, frozen=True, array_like=True, tag="piece", forbid_unknown_fields=True):
    """One piece, which is the message's payload."""

    index: Number


class Decline(msgspec.Struct, frozen=True, array_like=True, tag="decline", forbid_unknown_fields=True):
    """The sender does not have the state that it was asked for."""


TransferTag = Ask | Want | Offer | Piece | Decline
