"""The two names of a peer: the one that people read, and the one that the wire knows.

On the wire a node is `name~random`: no two processes share that, not even two of one name, so nobody is taken for
another and nobody takes another's connection over. People, profiles and messages only know the part before the `~`.
`netem.endpoint.unique` makes such a name.
"""

from __future__ import annotations

SEPARATOR = "~"
OPERATOR = "(operator)"
"""Who changes a running network from outside it (`coordinator.operator`). No node can bear that name."""


def plain(peer: str) -> str:
    """The name that people read: the whole, where it has no random part."""
    return peer.partition(SEPARATOR)[0]
