"""How a run knows that it kept the emulated rate, and how it says that it did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.meters import make_meter

from coordinator.records.rates import missed_links, untrusted
from coordinator.records.recorder import aggregate
from netem import frames
from netem.counters import LinkCounters
from netem.link import Link, Terms, Verdict
from netem.network import Profile
from netem.segments import Message
from netem.shaper import Lane, Shaper
from node.measure.spans import Spans
from node.watch.recorded import caption, read_run

KIB = 1024
SEGMENT_S = 10 * KIB * 8 / 8e6  # of 10 KiB at the rate below, but for the header


def profile(**changes: Any) -> Profile:
    return Profile(**({"rate_bps": 8e6, "latency_s": 0.01, "segment_size_bytes": 10 * KIB} | changes))


def link(incarnation: int, window_bytes: int) -> Link:
    return Link("r", incarnation, Terms(window_bytes, window_bytes, resend_s=1e9, silent_s=1e9, ack_delay_s=0.0))


def stalled(acknowledged_at: float, network: Profile, lanes: int = 1) -> Lane:
    """A lane with credit for one segment, that gets it back at that time, and goes on with the second."""
    shaper = Shaper("a", network)
    lane = shaper.add("b", link(1, 10 * KIB))
    for index in range(1, lanes):
        shaper.add(f"other-{index}", link(1, 10 * KIB))
    lane.enqueue(Message(b"", [memoryview(bytes(20 * KIB))]))
    assert not list(shaper.poll(0.0))
    ((_, _, first),) = shaper.poll(0.1)
    lane.link.written(first, 0.1)
    reader = link(2, 10 * KIB)
    header = frames.decode(first.header, max_tag_bytes=100)
    reader.renewed(header)
    assert reader.receive(header, 0.1) is Verdict.NEXT
    reader.accept(first.nbytes, 0.1)
    answer = frames.decode(reader.acknowledgement().header, max_tag_bytes=100)
    lane.link.renewed(answer)
    lane.link.receive(answer, acknowledged_at)
    list(shaper.poll(acknowledged_at))
    return lane


def test_time_that_a_link_idles_for_want_of_credit_is_counted() -> None:
    lane = stalled(2.0, profile())
    assert lane.stalled_s == pytest.approx(2.0 - SEGMENT_S, abs=0.001)


@pytest.mark.parametrize("changes", [{"loss": 0.01}, {"window_bytes": 10 * KIB}], ids=["loss", "window"])
def test_but_not_where_the_network_is_to_blame(changes: dict[str, Any]) -> None:
    assert stalled(2.0, profile(**changes)).stalled_s == 0.0


def test_others_at_one_nic_may_hold_up_credit_as_long_as_taking_turns_would() -> None:
    assert stalled(2 * SEGMENT_S, profile(scope="nic"), lanes=3).stalled_s == 0.0
    assert stalled(2.0, profile(scope="nic"), lanes=3).stalled_s == pytest.approx(2.0 - 3 * SEGMENT_S, abs=0.001)


def test_what_a_transfer_took_is_promised_or_missed() -> None:
    counters = LinkCounters()
    counters.note_transfer(1.0, 0.01, 0.0)
    counters.note_transfer(2.0, 0.0, 0.5)
    assert counters.promised_s == pytest.approx(0.99 + 1.5)
    assert counters.missed_s == pytest.approx(0.51)


def test_each_step_says_what_was_promised_and_missed_on_each_link_with_a_rate() -> None:
    links = {"node-1~abc": LinkCounters(promised_s=4.0, missed_s=1.0), "unshaped": LinkCounters(wire_bytes=10)}
    meter = make_meter(Spans(), Path(), links=lambda: links)
    links["node-1~abc"].note_transfer(2.0, 0.5, 0.0)
    told = {key: value for key, value in meter.step_metrics().items() if key.startswith("link/")}
    assert told == pytest.approx({"link/node-1/promised_s": 1.5, "link/node-1/missed_s": 0.5})


def record(step: int, *, missed_s: float, promised_s: float = 1.0, **top: Any) -> dict[str, Any]:
    """Two nodes; the link from node-0 to node-1 is late, the other one in time."""
    nodes = {
        "node-0": {"link/node-1/promised_s": promised_s, "link/node-1/missed_s": missed_s, "step_s": 1.0},
        "node-1": {"link/node-0/promised_s": promised_s, "link/node-0/missed_s": 0.0, "step_s": 1.0},
    }
    return {"step": step, "time": 100.0 + step, "loss": 1.0, "nodes": nodes, **top}


def test_a_run_is_untrusted_by_the_links_that_were_late_over_all_its_steps() -> None:
    records = [record(1, missed_s=0.3), *(record(step, missed_s=0.0) for step in range(2, 5))]
    (missed,) = missed_links(records)
    assert (missed.source, missed.target) == ("node-0", "node-1")
    assert missed.share == pytest.approx(0.3 / 4.3)
    assert untrusted(records) == ("untrusted: 1 link missed the emulated rate by more than 3%; node-0 → node-1 by 7.0%")


def test_three_per_cent_are_allowed_and_a_hiccup_in_little_traffic_says_nothing() -> None:
    assert untrusted([record(step, missed_s=0.029) for step in range(5)]) is None
    assert untrusted([record(1, missed_s=0.029, promised_s=0.1)]) is None


def test_a_short_run_on_a_network_that_this_host_cannot_carry_is_untrusted_too() -> None:
    """Of 100 Gbit/s, twelve small steps are promised in 22 ms, and took 0.2 s."""
    assert "by 89.9%" in (untrusted([record(1, missed_s=0.196, promised_s=0.022)]) or "")
    assert untrusted([{"step": 1}]) is None  # of a version that did not count it


def test_the_report_bears_the_mark_and_the_reason(tmp_path: Path) -> None:
    for name, missed_s in (("late", 0.1), ("kept", 0.01)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record(step, missed_s=missed_s)) + "\n" for step in range(1, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    late, kept = read_run(tmp_path / "late"), read_run(tmp_path / "kept")
    assert late.name == "late (untrusted)"
    assert caption(late).splitlines()[-1].startswith("untrusted: 1 link missed the emulated rate")
    assert kept.name == "kept"
    assert "untrusted" not in caption(kept)


def test_figures_of_single_links_are_not_added_up() -> None:
    nodes = record(1, missed_s=0.1)["nodes"]
    assert aggregate(nodes) == {"step_s": 1.0}
