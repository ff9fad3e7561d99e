"""Chunks to ranks, and who reads from whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.assignment import Assignment, Mode, assign
from netem.errors import ConfigError


@pytest.mark.parametrize(
    ("chunks", "nodes", "mode", "counts", "expected"),
    [
        (4, 1, "contiguous", (), [[0, 1, 2, 3]]),
        (4, 4, "contiguous", (), [[0], [1], [2], [3]]),
        (7, 3, "contiguous", (), [[0, 1, 2], [3, 4], [5, 6]]),
        (8, 4, "zigzag", (), [[0, 7], [1, 6], [2, 5], [3, 4]]),
        (8, 2, "zigzag", (), [[0, 3, 4, 7], [1, 2, 5, 6]]),
        (3, 3, "zigzag", (), [[0], [1], [2]]),
        (6, 2, "zigzag", (), [[0, 2, 5], [1, 3, 4]]),
        (5, 2, "zigzag", (), [[0, 3, 4], [1, 2]]),
        (4, 2, "contiguous", (3, 1), [[0, 1, 2], [3]]),
    ],
)
def test_modes(chunks: int, nodes: int, mode: Mode, counts: tuple[int, ...], expected: list[list[int]]) -> None:
    assert assign(chunks, nodes, mode, counts).to_lists() == expected


def test_readers_are_the_other_owners_of_later_chunks() -> None:
    contiguous = assign(4, 4)
    assert [contiguous.readers_of(chunk) for chunk in range(4)] == [(1, 2, 3), (2, 3), (3,), ()]
    zigzag = assign(4, 2, "zigzag")  # [[0, 3], [1, 2]]
    assert [zigzag.readers_of(chunk) for chunk in range(4)] == [(1,), (0,), (0,), ()]
    uneven = assign(4, 2, chunks_per_node=(3, 1))
    assert [uneven.readers_of(chunk) for chunk in range(4)] == [(1,), (1,), (1,), ()]


@given(data=st.data(), chunks=st.integers(1, 24), mode=st.sampled_from(["contiguous", "zigzag"]))
def test_readers_are_a_view_of_the_causal_triangle(data: st.DataObject, chunks: int, mode: Mode) -> None:
    nodes = data.draw(st.integers(1, chunks))
    assignment = assign(chunks, nodes, mode)
    assert assignment.n_chunks == chunks
    assert assignment.n_ranks == nodes
    assert sum(assignment.weights()) == pytest.approx(1.0)
    owners = [assignment.owner(chunk) for chunk in range(chunks)]
    for chunk in range(chunks):
        assert chunk in assignment.chunks(owners[chunk])
        expected = set(owners[chunk + 1 :]) - {owners[chunk]}
        assert set(assignment.readers_of(chunk)) == expected
    assert Assignment(assignment.to_lists()) == assignment


def test_zigzag_balances_the_triangle_where_two_chunks_go_to_each() -> None:
    assignment = assign(16, 8, "zigzag")
    work = {sum(chunk + 1 for chunk in assignment.chunks(rank)) for rank in range(8)}
    assert len(work) == 1


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 7])
def test_zigzag_is_even_in_every_number_of_rounds(nodes: int, rounds: int) -> None:
    assignment = assign(rounds * nodes, nodes, "zigzag")
    sums = [sum(assignment.chunks(rank)) for rank in range(nodes)]
    assert max(sums) - min(sums) <= (rounds % 2 and 1 - nodes % 2)


def test_auto_is_for_whoever_starts_a_run() -> None:
    with pytest.raises(ConfigError, match='assignment = "auto": isthmus run, coordinator'):
        assign(4, 2, "auto")
    with pytest.raises(ConfigError, match="more nodes than chunks"):
        assign(4, 5, "auto")


def test_assignments_that_differ_have_other_digests() -> None:
    assert assign(4, 2).digest() == assign(4, 2, chunks_per_node=(2, 2)).digest()
    assert assign(4, 2).digest() != assign(4, 2, "zigzag").digest()


def test_more_nodes_than_chunks_says_how_to_mend_it() -> None:
    with pytest.raises(ConfigError, match=r"nodes = 5: more nodes than chunks \(4\).*at most 4.*model\.chunks"):
        assign(4, 5)


@pytest.mark.parametrize("counts", [(3, 2), (4,), (4, 0), (2, 1, 1)])
def test_counts_that_do_not_add_up(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="chunks_per_node"):
        assign(4, 2, chunks_per_node=counts)


@pytest.mark.parametrize("lists", [[], [[]], [[0], []], [[0, 0]], [[1]], [[0, 2]], [[0], [0, 1]]])
def test_an_assignment_must_give_each_chunk_one_owner(lists: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="one owner"):
        Assignment(lists)


@pytest.mark.parametrize("chunk", [-1, 4])
def test_a_chunk_that_is_not_there(chunk: int) -> None:
    with pytest.raises(IndexError, match=f"chunk {chunk} of 4"):
        assign(4, 2).owner(chunk)
