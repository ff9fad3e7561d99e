"""The duration of an averaging round: the ring of `node.train.averaging`, each hop as slow as its slowest link."""

from __future__ import annotations

import math

import numpy as np

from node.config import Config
from node.lab.plan.lines import Lines
from node.train.averaging import BUCKET_ELEMENTS, bytes_sent
from node.train.ring_formats import FLOAT32, RING_FORMATS, RingFormat


def form_of(config: Config) -> RingFormat:
    """The format of the config's averaging rounds: gradients are always averaged in float32."""
    return RING_FORMATS["float32" if config.train.sync_every == 1 else config.train.sync_format]


def averaging_bytes(elements: int, ranks: int, form: RingFormat = FLOAT32) -> float:
    """Payload bytes that a node sends in one round; the mean over nodes."""
    return float(np.mean([bytes_sent(elements, form, ranks, rank) for rank in range(ranks)]))


def averaging_s(elements: int, lines: Lines, form: RingFormat = FLOAT32) -> float:
    """Seconds of one round over `elements` numbers: 2(N−1) hops, buckets one after the other.

    A bucket takes its transmission time for one hop, and arrives one latency later. Its next hop waits for that, unless
    other buckets fill the time. Neither the sums nor the vote (a round trip to the coordinator) are counted.
    """
    ranks = len(lines.up_bps)
    if ranks == 1:
        return 0.0
    here = np.arange(ranks)
    there = (here + 1) % ranks
    rates = np.minimum(lines.link_bps[here, there], np.minimum(lines.up_bps, lines.down_bps[there]))
    latency_s = float(lines.latency_s[here, there].max())
    buckets = math.ceil(elements / BUCKET_ELEMENTS)
    hops = 2 * (ranks - 1)
    all_s = 8 * averaging_bytes(elements, ranks, form) / hops / float(rates.min())  # one hop of all buckets
    one_s = all_s / buckets
    turn_s = max(all_s, one_s + latency_s)
    return (hops - 1) * turn_s + all_s + latency_s
