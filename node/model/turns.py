"""Pieces of work that take turns: while one waits for the network, another computes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(works: Sequence[Generator[None, None, T]]) -> list[T]:
    """Run generators to their ends, a step of each in turn; their results in order."""
    results: dict[int, T] = {}
    while len(results) < len(works):
        for index, work in enumerate(works):
            if index not in results:
                try:
                    next(work)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(works))]
