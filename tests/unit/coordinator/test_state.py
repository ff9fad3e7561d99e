"""What a coordinator keeps of itself: it comes back as it was, or is refused by name."""

from __future__ import annotations

import msgspec
import pytest
from helpers.fake_coordinator import join

from coordinator.state import SavedSeat, SavedState, decode_state, encode_state, slot_bytes
from netem.changes import Cut
from netem.errors import ConfigError
from netem.schedule import Timed


def state(nodes: int = 2, changes: int = 1) -> SavedState:
    seats = [
        SavedSeat(peer=f"node-{rank}~0123456789abcdef", place=rank, join=join(f"node-{rank}", rank=rank))
        for rank in range(nodes)
    ]
    return SavedState(
        run="tiny",
        config_digest="cfg",
        address="tcp://127.0.0.1:7070",
        start_step=0,
        generation=4,
        step=17,
        tail=["weights"],
        next_round=40,
        committed=39,
        members=[seat.peer for seat in seats],
        seats=seats,
        began_s=1.7e9,
        changes=[Timed(at_s=5.0, change=Cut(ends=("node-0", "node-1")))] * changes,
    )


def test_a_state_comes_back_as_it_was() -> None:
    assert decode_state(encode_state(state()), "tiny", "cfg", "file") == state()


def test_a_run_of_a_thousand_nodes_with_long_names_has_room() -> None:
    """The longest names and addresses that a `Join` may have."""
    longest = join("n" * 64, address="tcp://" + "a" * 250, host="h" * 512, run="r" * 512, config_digest="c" * 128)
    seats = [SavedSeat(peer="n" * 64 + "~" + "f" * 32, place=rank, join=longest) for rank in range(1000)]
    whole = encode_state(
        msgspec.structs.replace(state(changes=10_000), seats=seats, members=[seat.peer for seat in seats])
    )
    assert len(whole) < slot_bytes(1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "file: not the state of a coordinator of this version"),
        (b"\xc1", "file: not the state of a coordinator of this version"),
        (encode_state(state())[:-1], "file: not the state of a coordinator of this version"),
        (encode_state(msgspec.structs.replace(state(), version=9)), "file: of version 9, this isthmus has version 1"),
        (
            encode_state(msgspec.structs.replace(state(), run="big")),
            "file: of the run 'big', this coordinator has 'tiny'",
        ),
        (encode_state(msgspec.structs.replace(state(), config_digest="other")), "of the config 'other'"),
        (encode_state(msgspec.structs.replace(state(), step=-1)), "not the state"),
    ],
    ids=["empty", "garbage", "cut", "version", "run", "config", "negative"],
)
def test_what_is_no_state_of_this_run_is_refused_with_what_to_do(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        decode_state(data, "tiny", "cfg", "file")
    assert "or remove file to go on from a checkpoint" in str(caught.value)
