"""Who sends which piece to whom: every reader gets all of a payload once, and every line up carries its mean."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.assignment import Assignment, assign
from node.exchange.routes import LEAST_PIECE_BYTES, MOST_PIECES, Routes, direct, pieces_in, relayed, span_of

NBYTES = 8 * 1000


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    """Any assignment at all: up to 9 chunks among up to 6 ranks."""
    ranks = draw(st.integers(1, 6))
    owners = draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=9 - ranks))]))
    return Assignment([[chunk for chunk, owner in enumerate(owners) if owner == rank] for rank in range(ranks)])


def sent_by(routes: Routes, assignment: Assignment, nbytes: int = NBYTES) -> list[int]:
    """Bytes that each rank sends of one layer's payloads."""
    sent = Counter[int]()
    for chunk in range(assignment.n_chunks):
        for sender, _, part_bytes in routes.deliveries(chunk, nbytes):
            sent[sender] += part_bytes
    return [sent[rank] for rank in range(assignment.n_ranks)]


@given(assignments(), st.integers(1, 9))
def test_every_reader_gets_every_piece_once_from_somebody_who_has_it(assignment: Assignment, pieces: int) -> None:
    routes = relayed(assignment, pieces)
    for chunk in range(assignment.n_chunks):
        owner, readers = assignment.owner(chunk), assignment.readers_of(chunk)
        assert routes.pieces(chunk) == (pieces if routes.relays(chunk) else 1)
        for piece in range(routes.pieces(chunk)):
            assert routes.source(owner, chunk, piece) is None
            got = [target for rank in range(assignment.n_ranks) for target in routes.targets(rank, chunk, piece)]
            assert sorted(got) == list(readers)
            for reader in readers:
                sender, hops = routes.source(reader, chunk, piece), 1
                while sender != owner:
                    assert sender is not None
                    assert hops < len(readers)
                    sender, hops = routes.source(sender, chunk, piece), hops + 1
        received = Counter[int]()
        for _, receiver, part_bytes in routes.deliveries(chunk, NBYTES + 5):
            received[receiver] += part_bytes
        assert received == dict.fromkeys(readers, NBYTES + 5)


@given(assignments())
def test_nobody_sends_more_than_without_a_relay_did_the_most(assignment: Assignment) -> None:
    assert max(sent_by(relayed(assignment, 8), assignment)) <= max(sent_by(direct(assignment), assignment))


@pytest.mark.parametrize(
    ("assignment", "most", "mean"),
    [
        (assign(4, 4), 3.0, 1.5),
        (assign(8, 8), 7.0, 3.5),
        (assign(16, 8), 14.0, 7.0),
        (assign(8, 4, "zigzag"), 6.0, 4.5),
    ],
)
def test_every_line_up_carries_its_mean(assignment: Assignment, most: float, mean: float) -> None:
    assert max(sent_by(direct(assignment), assignment)) == most * NBYTES
    assert sent_by(relayed(assignment, MOST_PIECES), assignment) == [mean * NBYTES] * assignment.n_ranks


def test_an_owner_sends_each_piece_once_even_where_that_is_more_than_the_mean() -> None:
    assert sent_by(relayed(assign(8, 4, chunks_per_node=(5, 1, 1, 1)), 8), assign(8, 4)) == [
        5.0 * NBYTES,
        4.5 * NBYTES,
        4.25 * NBYTES,
        4.25 * NBYTES,
    ]


def test_two_nodes_have_nobody_to_pass_anything_on_to() -> None:
    for assignment in (assign(4, 2), assign(4, 2, "zigzag"), assign(4, 1)):
        assert not any(relayed(assignment, 8).relays(chunk) for chunk in range(4))


def test_those_that_pass_a_piece_on_get_it_first() -> None:
    routes = relayed(assign(4, 4), 8)
    passes_on = [bool(routes.targets(rank, 0, piece)) for piece, rank in routes.sends(0, 0)]
    assert passes_on == sorted(passes_on, reverse=True)
    assert set(passes_on) == {False, True}
    assert routes.sends(3, 2) == []


def test_pieces_are_the_whole_and_no_smaller_than_pays() -> None:
    for nbytes in (1, LEAST_PIECE_BYTES, 5 * LEAST_PIECE_BYTES + 3, 1 << 30):
        pieces = pieces_in(nbytes)
        spans = [span_of(piece, pieces, nbytes) for piece in range(pieces)]
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == nbytes
        assert pieces == 1 or min(end - begin for begin, end in spans) >= LEAST_PIECE_BYTES
    assert (pieces_in(2 * LEAST_PIECE_BYTES), pieces_in(1 << 30)) == (2, MOST_PIECES)
