"""What happens at which step."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.small import schedule_of
from helpers.worlds import tiny_config

from coordinator.plan import TAKE
from netem.errors import ConfigError
from node.exchange.passes import PassSpec


def rounds(steps: int = 8, warmup_steps: int = 3, sync_every: int = 4, **compress: Any) -> list[list[str]]:
    config = tiny_config(
        train={"steps": steps, "sync_every": sync_every}, compress={"warmup_steps": warmup_steps, **compress}
    )
    whole = [schedule_of(config).rounds(step) for step in range(1, steps + 1)]
    return [[kind for kind in kinds if kind != TAKE] for kinds in whole]


def test_a_step_is_taken_by_all_before_what_needs_its_weights() -> None:
    config = tiny_config(
        train={"steps": 12, "sync_every": 4, "eval_every": 8, "checkpoint_every": 4}, compress={"warmup_steps": 3}
    )
    kinds = {step: schedule_of(config).rounds(step) for step in range(1, 13)}
    assert [step for step in kinds if TAKE in kinds[step]] == [1, 3, 4, 8, 12]  # the first step is evaluated
    assert kinds[4] == ["moments", "basis", TAKE, "weights"]
    exact = tiny_config(train={"steps": 12, "sync_every": 1, "checkpoint_every": 5}, compress={"warmup_steps": 3})
    assert [step for step in range(1, 13) if TAKE in schedule_of(exact).rounds(step)] == [1, 5, 10, 12]
    assert schedule_of(exact).rounds(5) == ["gradients", TAKE]


@pytest.mark.parametrize(("every", "alone"), [(1, [0] * 9), (4, [0, 1, 2, 0, 0, 1, 2, 3, 0])])
def test_what_a_lost_node_has_changed_alone_is_counted(every: int, alone: list[int]) -> None:
    config = tiny_config(train={"steps": 12, "sync_every": every}, compress={"warmup_steps": 3})
    assert [schedule_of(config).alone(done) for done in range(9)] == alone


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
    assert schedule_of(config).pass_spec(1) == PassSpec(8, False)


def fragments_of(steps: int = 14, compress: dict[str, Any] | None = None, **train: Any) -> list[tuple[int, int, str]]:
    """When each fragment begins and ends, by its end. Where it does not travel, both are the same step."""
    config = tiny_config(
        train={"steps": steps, "sync_every": 6, "sync_fragments": 2, **train}, compress=compress or {"mode": "dense"}
    )
    every = config.train.sync_every
    under_way: dict[str, int] = {}
    found = []
    for step in range(1, steps + 1):
        for kind in schedule_of(config).begins(step):
            assert not under_way, "one fragment is under way at a time"
            under_way[kind] = step
        found += [(step, step, kind) for kind in schedule_of(config).rounds(step) if kind.startswith("fragment")]
        found += [(under_way.pop(kind), step, kind) for kind in schedule_of(config).ends(step)]
        assert not under_way or (step % every and not schedule_of(config).closes(step)), "a checkpoint may be here"
    assert not under_way
    return found


def test_each_fragment_has_a_turn_of_its_own() -> None:
    one, two = "fragment 1 of 2", "fragment 2 of 2"
    assert fragments_of() == [(3, 3, one), (6, 6, two), (9, 9, one), (12, 12, two)]
    assert fragments_of(sync_delay=2) == [(2, 3, one), (5, 6, two), (8, 9, one), (11, 12, two)]
    assert fragments_of(sync_delay=3) == [(4, 6, two), (7, 9, one), (10, 12, two)]  # nothing is learned before step 1
    assert fragments_of(sync_fragments=1, sync_delay=1) == [(6, 6, "fragment 1 of 1"), (12, 12, "fragment 1 of 1")]
    uneven = fragments_of(21, sync_every=7, sync_fragments=3, sync_delay=2)
    assert [(begin, end) for begin, end, _ in uneven] == [
        (3, 4),
        (6, 7),
        (8, 9),
        (10, 11),
        (13, 14),
        (15, 16),
        (17, 18),
    ]


def test_all_weights_are_averaged_where_they_must_be_equal_and_no_fragment_crosses_that() -> None:
    """The warm start ends after 4 steps, the basis is refreshed after 16, the run ends after 20."""
    compress = {"warmup_steps": 4, "refresh_every": 6}
    config = tiny_config(train={"steps": 20, "sync_every": 6, "sync_fragments": 2, "sync_delay": 2}, compress=compress)
    assert [step for step in range(1, 21) if "weights" in schedule_of(config).rounds(step)] == [4, 12, 18, 20]
    assert [(begin, end) for begin, end, _ in fragments_of(20, compress, sync_delay=2)] == [
        (2, 3),
        (8, 9),
        (14, 15),
    ]
    assert [step for step in range(21) if schedule_of(config).closes(step)] == [0, 4, 12, 18, 20]


@pytest.mark.parametrize("fragments", range(1, 4))
@pytest.mark.parametrize("every", range(3, 12))
def test_no_setting_has_two_fragments_under_way(every: int, fragments: int) -> None:
    for delay in range(every // fragments + 1):
        found = fragments_of(40, sync_every=every, sync_fragments=fragments, sync_delay=delay)
        assert all(end - begin == max(delay, 1) - 1 for begin, end, _ in found)
        assert bool(found) == (fragments > 1 or delay > 0)


def test_what_a_format_leaves_out_is_sent_where_weights_must_be_equal() -> None:
    for form, last in (("bfloat16", "bfloat16"), ("int8", "float32"), ("topk10", "float32")):
        config = tiny_config(train={"steps": 9, "sync_every": 4, "sync_format": form}, compress={"mode": "dense"})
        assert [schedule_of(config).sync_format(step) for step in (4, 8, 9)] == [form, form, last]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"sync_every": 1, "sync_delay": 1}, r"train\.sync_delay = 1: expected 0, since train\.sync_every = 1"),
        ({"sync_every": 1, "sync_fragments": 2}, r"train\.sync_fragments = 2: expected 1, since train\.sync_every = 1"),
        ({"sync_every": 2, "sync_fragments": 3}, r"train\.sync_fragments = 3: expected at most train\.sync_every = 2"),
        ({"sync_every": 7, "sync_fragments": 2, "sync_delay": 4}, r"train\.sync_delay = 4: expected at most 3 "),
        ({"sync_every": 8, "sync_fragments": 4}, r"train\.sync_fragments = 4: expected at most model\.layers = 3"),
    ],
    ids=str,
)
def test_fragments_that_do_not_fit_are_refused(train: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(train=train)


def test_the_warm_start_has_short_chunks_and_sends_them_whole() -> None:
    config = tiny_config(compress={"warmup_steps": 3, "warmup_share": 0.5})
    assert [schedule_of(config).pass_spec(step) for step in (1, 3, 4)] == [
        PassSpec(4, False),
        PassSpec(4, False),
        PassSpec(8, True),
    ]


def test_the_rate_rises_and_falls_linearly() -> None:
    train = {"lr": 1.0, "steps": 14, "lr_warmup_steps": 4, "lr_final_share": 0.2}
    config = tiny_config(train=train)
    rates = [schedule_of(config).learning_rate(step) for step in range(1, 15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([1.0 - 0.08 * done for done in range(1, 11)])
    config = tiny_config(train=train | {"lr_warmup_steps": 0, "lr_final_share": 0.0})
    assert [schedule_of(config).learning_rate(step) for step in (7, 14)] == pytest.approx([0.5, 0.0])


def test_a_warm_up_longer_than_the_run_is_no_division_by_zero() -> None:
    config = tiny_config(train={"lr": 1.0, "steps": 4, "lr_warmup_steps": 8})
    assert schedule_of(config).learning_rate(4) == pytest.approx(0.5)


@pytest.mark.parametrize(("every", "saved", "evaluated"), [(0, [8], [1, 8]), (2, [2, 4, 6, 8], [1, 2, 4, 6, 8])])
def test_when_checkpoints_and_evaluations_happen(every: int, saved: list[int], evaluated: list[int]) -> None:
    config = tiny_config(train={"steps": 8, "sync_every": 2, "checkpoint_every": every, "eval_every": every})
    steps = range(1, 9)
    assert [step for step in steps if schedule_of(config).saves(step)] == saved
    assert [step for step in steps if schedule_of(config).evaluates(step)] == evaluated
