"""The one writer of Markdown tables, for certificates, plans, studies and benchmarks. Text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "l") -> str:
    """A Markdown table without a line end, its columns padded so that it also reads as plain text.

    `align` has a letter for each column, "l" for left (text) and "r" for right (numbers). The last letter holds for
    all further columns, so "lr" is a column of names and then numbers. A cell may contain "|" and line ends: the first
    is escaped, the second become blanks. Raises `ValueError` where a row has another number of cells than the head.
    """
    lines = [[_cell(cell) for cell in cells] for cells in (head, *rows)]
    for place, cells in enumerate(lines):
        if len(cells) != len(head):
            raise ValueError(f"row {place} of the table has {len(cells)} cells, and the head has {len(head)}")
    right = [(align[place] if place < len(align) else align[-1]) == "r" for place in range(len(head))]
    widths = [max(len(cells[place]) for cells in lines) for place in range(len(head))]
    rule = "|".join(
        "-" * (width + 1) + (":" if is_right else "-") for width, is_right in zip(widths, right, strict=True)
    )
    head_line, *row_lines = (_line(cells, widths, right) for cells in lines)
    return "\n".join([head_line, f"|{rule}|", *row_lines])


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if is_right else cell.ljust(width)
        for cell, width, is_right in zip(cells, widths, right, strict=True)
    )
    return f"| {' | '.join(padded)} |"


def _cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", r"\|")
