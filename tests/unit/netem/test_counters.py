"""Totals of one link: how they are added up, and what counts as late."""

from msgspec import structs

from netem.counters import LinkCounters


def test_totals_of_two_links_add_up_but_the_worst_lateness_stays_the_worst() -> None:
    names = LinkCounters.__struct_fields__
    one = LinkCounters(**{name: number for number, name in enumerate(names, start=1)})
    other = LinkCounters(**{name: 100 * number for number, name in enumerate(names, start=1)})
    expected = {name: 101 * number for number, name in enumerate(names, start=1)}
    expected["lateness_max_s"] = other.lateness_max_s
    one.add(other)
    assert structs.asdict(one) == expected


def test_totals_begin_at_zero() -> None:
    assert set(structs.asdict(LinkCounters()).values()) == {0}


def test_a_transfer_is_promised_the_time_that_it_took_less_what_this_host_was_late() -> None:
    counters = LinkCounters()
    counters.note_transfer(took_s=2.0, late_s=0.25, stalled_s=0.5)
    counters.note_transfer(took_s=1.0, late_s=0.0, stalled_s=0.0)
    assert (counters.promised_s, counters.missed_s) == (2.25, 0.75)


def test_mean_lateness_is_by_frame_and_zero_without_any() -> None:
    assert LinkCounters().mean_lateness_s == 0.0
    assert LinkCounters(segments=4, lateness_s=2.0).mean_lateness_s == 0.5
