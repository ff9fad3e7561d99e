"""What happens at which step."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.worlds import tiny_config

from node.exchange.passes import PassSpec
from node.train.schedule import evaluates, learning_rate, pass_spec, rounds_for, saves


def rounds(steps: int = 8, warmup_steps: int = 3, sync_every: int = 4, **compress: Any) -> list[list[str]]:
    config = tiny_config(
        train={"steps": steps, "sync_every": sync_every}, compress={"warmup_steps": warmup_steps, **compress}
    )
    return [rounds_for(config, step) for step in range(1, steps + 1)]


def test_weights_are_averaged_every_c_steps_at_the_end_of_the_warm_start_and_at_the_end() -> None:
    assert rounds(steps=10) == [
        [],
        [],
        ["weights"],
        ["moments", "basis", "weights"],
        [],
        [],
        [],
        ["weights"],
        [],
        ["weights"],
    ]


def test_with_c_1_gradients_are_averaged_in_every_step() -> None:
    assert rounds(steps=5, sync_every=1) == [["gradients"]] * 3 + [["moments", "basis", "gradients"], ["gradients"]]


def test_a_basis_of_the_weights_needs_no_moments() -> None:
    assert rounds(basis="weights")[3] == ["basis", "weights"]


def test_without_a_warm_start_the_basis_is_taken_first() -> None:
    assert rounds(warmup_steps=0)[0] == ["moments", "basis"]


@pytest.mark.parametrize("mode", ["dense", "local"])
def test_without_compression_there_is_no_basis_and_no_warm_start(mode: str) -> None:
    assert rounds(steps=5, mode=mode) == [[], [], [], ["weights"], ["weights"]]
    config = tiny_config(compress={"mode": mode})
    assert pass_spec(config, 1) == PassSpec(8, False)


def test_the_warm_start_has_short_chunks_and_sends_them_whole() -> None:
    config = tiny_config(compress={"warmup_steps": 3, "warmup_share": 0.5})
    assert [pass_spec(config, step) for step in (1, 3, 4)] == [
        PassSpec(4, False),
        PassSpec(4, False),
        PassSpec(8, True),
    ]


def test_the_rate_rises_and_falls_linearly() -> None:
    train = {"lr": 1.0, "steps": 14, "lr_warmup_steps": 4, "lr_final_share": 0.2}
    config = tiny_config(train=train)
    rates = [learning_rate(config, step) for step in range(1, 15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([1.0 - 0.08 * done for done in range(1, 11)])
    config = tiny_config(train=train | {"lr_warmup_steps": 0, "lr_final_share": 0.0})
    assert (learning_rate(config, 7), learning_rate(config, 14)) == (pytest.approx(0.5), pytest.approx(0.0))


def test_a_warm_up_longer_than_the_run_is_no_division_by_zero() -> None:
    config = tiny_config(train={"lr": 1.0, "steps": 4, "lr_warmup_steps": 8})
    assert learning_rate(config, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(("every", "saved", "evaluated"), [(0, [8], [1, 8]), (2, [2, 4, 6, 8], [1, 2, 4, 6, 8])])
def test_when_checkpoints_and_evaluations_happen(every: int, saved: list[int], evaluated: list[int]) -> None:
    config = tiny_config(train={"steps": 8, "sync_every": 2, "checkpoint_every": every, "eval_every": every})
    steps = range(1, 9)
    assert [step for step in steps if saves(config, step)] == saved
    assert [step for step in steps if evaluates(config, step)] == evaluated
