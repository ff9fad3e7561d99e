"""What is said of a run under chaos, from records whose answer is known."""

from collections import Counter

import pytest

from node.lab.chaos.drive import Outcome, Sample
from node.lab.chaos.schedule import Disturbance, Kind
from node.lab.chaos.verdict import effects, lines, lives, throughput_kept


def outcome(**changes: object) -> Outcome:
    """Ten steps a second for 100 s, but none from 40 s to 46 s, when a node is killed; a generation more afterwards."""
    records = [
        (0.1 * tick, {"step": step, "generation": 1 + (tick >= 460)})
        for step, tick in enumerate(tick for tick in range(1000) if not 400 <= tick < 460)
    ]
    killed = Disturbance(40.0, 4.0, Kind.KILL, "node-1")
    made = Outcome(records, [killed], [], Counter({"node-1": 1}), "")
    return made._replace(**changes)


def test_how_long_the_run_stood_still() -> None:
    (effect,) = effects(outcome(), recovery_s=10.0)
    assert effect.stood_s == pytest.approx(6.0, abs=0.11)
    assert effect.generations == 1


def test_a_run_that_never_goes_on_stands_still_until_the_end() -> None:
    before = [(at_s, record) for at_s, record in outcome().records if at_s < 40]
    (effect,) = effects(outcome(records=before), recovery_s=10.0)
    assert effect.stood_s == pytest.approx(14.0, abs=0.11)


def test_throughput_counts_only_the_time_without_disturbances() -> None:
    assert throughput_kept(outcome(), 100.0) == pytest.approx(1.0, abs=0.02)
    slow = [one for index, one in enumerate(outcome().records) if one[0] < 50 or index % 2]
    assert throughput_kept(outcome(records=slow), 100.0) == pytest.approx(0.5, abs=0.03)


def test_a_leak_is_growth_from_the_middle_to_the_end() -> None:
    samples = [Sample(float(at), "node-0", 1000 * at, 5, 7 + at // 50, 3, 71) for at in range(100)]
    samples += [Sample(float(at), "node-1", 10**6 if at > 5 else 0, 5, 7, 2, 72 + (at > 80)) for at in range(100)]
    leaky, other = lives(samples)
    assert (leaky.process, leaky.lasted_s) == ("node-0", 99.0)
    assert [late - early for early, late in zip(leaky.early, leaky.late, strict=True)] == pytest.approx(
        [37_500, 0, 1, 0], abs=1000
    )
    assert (other.lasted_s, other.early, other.late) == (80.0, (1e6, 5, 7, 2), (1e6, 5, 7, 2)), "it was started again"


def test_the_page_names_each_disturbance_and_an_early_end() -> None:
    text = "\n".join(lines(outcome(ended="the coordinator has ended the run"), 100.0, 10.0))
    for word in ("kill", "node-1", "4.0 s", "missing in the records: 0", "ended early: the coordinator"):
        assert word in text
