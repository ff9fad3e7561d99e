"""When a checkpoint is complete, and which ones stay."""

from __future__ import annotations

import pytest

from coordinator.saves import MOST_UNFINISHED, Saves
from netem.errors import ProtocolError

ALL = ["a", "b"]


def test_a_checkpoint_is_complete_once_all_members_have_saved_it() -> None:
    saves = Saves()
    assert not saves.note("a", 3, ALL)
    with pytest.raises(ProtocolError, match="saved step 3 twice"):
        saves.note("a", 3, ALL)
    assert not saves.note("a", 6, ALL)
    assert saves.note("b", 3, ALL)
    assert saves.note("b", 6, ALL)


def test_a_part_of_a_member_that_has_gone_since_does_no_harm() -> None:
    saves = Saves()
    assert not saves.note("a", 3, ALL)
    assert saves.note("b", 3, ["b"])


def test_the_last_ones_stay() -> None:
    saves = Saves(keep_last=2, kept=[10])
    assert saves.oldest_kept == 0  # there are not as many yet
    for step, oldest in ((12, 10), (14, 12), (16, 14)):
        assert not saves.note("a", step, ALL)
        assert saves.note("b", step, ALL)
        assert saves.oldest_kept == oldest
    everything = Saves(keep_last=0, kept=[1, 2, 3])
    assert everything.oldest_kept == 0


def test_one_that_is_not_complete_does_not_push_out_one_that_is() -> None:
    """A node's disk is full for a long time: nothing is removed meanwhile, and the notes stay few."""
    saves = Saves(keep_last=1, kept=[10])
    for step in range(11, 200):
        assert not saves.note("a", step, ALL)
    assert saves.oldest_kept == 10
    assert len(saves._peers) <= MOST_UNFINISHED + 1
    assert saves.note("b", 199, ALL)
    assert saves.oldest_kept == 199
