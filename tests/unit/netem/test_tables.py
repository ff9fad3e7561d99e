"""The Markdown table: what a reader of the source sees, and what a renderer gets."""

import pytest

from netem.tables import markdown_table


def test_columns_are_padded_and_aligned_by_letter() -> None:
    text = markdown_table(["arm", "loss", "bytes"], [["dense", "3.1", "512"], ["x", "3.25", "8"]], align="lr")
    assert text.splitlines() == [
        "| arm   | loss | bytes |",
        "|-------|-----:|------:|",
        "| dense |  3.1 |   512 |",
        "| x     | 3.25 |     8 |",
    ]


def test_all_columns_are_text_unless_said_otherwise() -> None:
    assert markdown_table(["a", "b"], [["xy", "1"]]).splitlines() == ["| a  | b |", "|----|---|", "| xy | 1 |"]


def test_each_column_may_have_its_own_letter() -> None:
    assert markdown_table(["a", "b", "c"], [], align="rlr").splitlines() == ["| a | b | c |", "|--:|---|--:|"]


def test_no_cell_can_end_its_column_or_its_row() -> None:
    row = markdown_table(["a", "b"], [["x|y", "one\ntwo"]]).splitlines()[2]
    assert row == r"| x\|y | one two |"


def test_a_row_of_another_length_than_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2 of the table has 1 cells, and the head has 2"):
        markdown_table(["a", "b"], [["1", "2"], ["3"]])
