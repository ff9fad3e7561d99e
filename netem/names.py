"""The two names of a peer: one for people, and one for the wire.

On the wire a node is called `name~random`. No two processes have the same wire name, even if people gave them the same
name, so a process cannot be mistaken for another or take over its connection. People, profiles and messages use only
the part before the `~`. `netem.endpoint.unique` makes a wire name.
"""

from __future__ import annotations

SEPARATOR = "~"
OPERATOR = "(operator)"
"""The name of the endpoint that changes a running network (`coordinator.operator`). No node can have it."""


def plain(peer: str) -> str:
    """The name for people: the part before the `~`, or the whole name if it has none."""
    return peer.partition(SEPARATOR)[0]
