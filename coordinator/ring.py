"""The schedule of a ring all-reduce: which position sends which shard at which hop. Pure arithmetic; moves no bytes.

A vector of n elements is cut into N shards. In the reduce-scatter, N−1 hops, each position passes a running
sum to the next one, until position p holds the whole sum of shard p+1; in the all-gather, N−1 hops, the
finished shards go round. Every shard is summed once, in one order, and then copied: all members end with
the same bits. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009. `node` moves the
bytes.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

PhaseName = Literal["reduce-scatter", "all-gather"]


class Hop(NamedTuple):
    """One exchange of one position: it sends a shard to the next position and receives one from the previous.

    In the reduce-scatter what is received is added to the own shard; in the all-gather it replaces it.
    """

    phase: PhaseName
    hop: int
    send_shard: int
    receive_shard: int


class Shard(NamedTuple):
    """Elements `start` to `stop` (exclusive) of the vector; may be empty where n < N."""

    start: int
    stop: int


def shards(n_elements: int, world: int) -> list[Shard]:
    """Cut `n_elements` into `world` shards, the first ones longer by one element where it does not divide."""
    share, rest = divmod(n_elements, world)
    bounds = [rank * share + min(rank, rest) for rank in range(world + 1)]
    return [Shard(start, stop) for start, stop in itertools.pairwise(bounds)]


def schedule(world: int, position: int) -> list[Hop]:
    """The 2(N−1) hops of `position` in a ring of `world`, in order. A ring of one has none."""
    if not 0 <= position < world:
        raise ValueError(f"position {position} in a ring of {world}: expected 0 to {world - 1}")
    hops: list[Hop] = []
    for hop in range(world - 1):
        hops.append(Hop("reduce-scatter", hop, (position - hop) % world, (position - hop - 1) % world))
    for hop in range(world - 1):
        hops.append(Hop("all-gather", hop, (position + 1 - hop) % world, (position - hop) % world))
    return hops


def next_position(world: int, position: int) -> int:
    """The position that `position` sends to."""
    return (position + 1) % world


def previous_position(world: int, position: int) -> int:
    """The position that `position` receives from."""
    return (position - 1) % world


def lengths_sent(n_elements: int, world: int, position: int) -> list[int]:
    """The lengths of the shards that `position` sends in one all-reduce, hop by hop; an empty one is not sent."""
    lengths = [shard.stop - shard.start for shard in shards(n_elements, world)]
    return [lengths[hop.send_shard] for hop in schedule(world, position) if lengths[hop.send_shard]]


def bytes_sent(n_elements: int, itemsize_bytes: int, world: int, position: int) -> int:
    """Payload bytes that `position` sends in one all-reduce.

    All shards but p+1 in the reduce-scatter, all but p+2 in the all-gather: 2(N−1)/N of the vector where N
    divides n.
    """
    if world == 1:
        return 0
    lengths = [shard.stop - shard.start for shard in shards(n_elements, world)]
    kept = lengths[(position + 1) % world] + lengths[(position + 2) % world]
    return (2 * n_elements - kept) * itemsize_bytes
