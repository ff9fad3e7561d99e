"""The ring schedule, simulated: sums on every member, the same bits, and the bytes of the closed formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.ring import bytes_sent, next_position, previous_position, schedule, shards


def all_reduce(vectors: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Run the schedule hop by hop; gives each member's result and the bytes it sent."""
    world = len(vectors)
    cuts = shards(len(vectors[0]), world)
    results = [vector.copy() for vector in vectors]
    sent_bytes = [0] * world
    plans = [schedule(world, position) for position in range(world)]
    for hops in zip(*plans, strict=True):
        under_way = {}
        for position, hop in enumerate(hops):
            piece = results[position][slice(*cuts[hop.send_shard])].copy()
            sent_bytes[position] += piece.nbytes
            under_way[next_position(world, position)] = (hop.send_shard, piece)
        for position, hop in enumerate(hops):
            shard, piece = under_way[position]
            assert shard == hop.receive_shard
            assert hops[previous_position(world, position)].send_shard == shard
            place = slice(*cuts[shard])
            if hop.phase == "reduce-scatter":
                results[position][place] += piece
            else:
                results[position][place] = piece
    return results, sent_bytes


@settings(max_examples=150, deadline=None)
@given(world=st.integers(1, 9), n=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_every_member_ends_with_the_sum_and_the_same_bits(world: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal(n).astype(np.float32) for _ in range(world)]
    results, sent_bytes = all_reduce(vectors)
    expected = np.sum([vector.astype(np.float64) for vector in vectors], axis=0)
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        assert result.tobytes() == results[0].tobytes()
    assert sent_bytes == [bytes_sent(n, 4, world, position) for position in range(world)]


@given(world=st.integers(1, 50), n=st.integers(0, 10_000))
def test_shards_cover_the_vector_in_order_and_nearly_equally(world: int, n: int) -> None:
    cuts = shards(n, world)
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert cuts[-1].stop == n
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world", [2, 4, 8])
def test_where_it_divides_a_member_sends_twice_n_minus_1_nths(world: int) -> None:
    n = 1000 * world
    assert {bytes_sent(n, 2, world, position) for position in range(world)} == {2 * 2 * (world - 1) * 1000}


def test_one_alone_sends_nothing() -> None:
    assert schedule(1, 0) == []
    assert bytes_sent(100, 4, 1, 0) == 0


def test_a_position_outside_the_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="position 3 in a ring of 3"):
        schedule(3, 3)
