"""The form of a protocol's table: for each phase and each kind of event, the move, and where it may lead.

`run` and `member` hold such tables, and call `arrive` after every move. `diagram` draws the tables. No behaviour here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

PhaseT = TypeVar("PhaseT")
MoveT = TypeVar("MoveT")


class Row(NamedTuple, Generic[MoveT, PhaseT]):
    """One row: the function that makes the move, and every phase in which the machine may be after it.

    A move that may leave the phase as it is names that phase too.
    """

    move: MoveT
    leads_to: frozenset[PhaseT]


Table = Mapping[tuple[PhaseT, type], Row[MoveT, PhaseT]]


def row(move: MoveT, *phases: PhaseT) -> Row[MoveT, PhaseT]:
    """A row of a table."""
    return Row(move, frozenset(phases))


def arrive(table: Table[PhaseT, MoveT], before: PhaseT, kind: type, after: PhaseT) -> None:
    """Assert that the move of (`before`, `kind`) may lead to the phase `after`."""
    expected = table[before, kind].leads_to
    assert after in expected, f"{kind.__name__} in {before} led to {after}, expected one of {expected}"
