"""A process that stays in a generation which is over, because its site does not answer, ends."""

from __future__ import annotations

import threading

from node.site.deadline import Deadline

LONG_S = 60.0


def test_who_stays_in_a_generation_that_is_over_is_ended_with_the_reason() -> None:
    said, ended = [], threading.Event()

    def end(text: str) -> None:
        said.append(text)
        ended.set()

    watch = Deadline(0.0, end)
    with watch.inside(4):
        watch.over(4)
        assert not ended.wait(0.05), "it is the generation that has begun"
        watch.over(5)
        assert ended.wait(LONG_S)
    assert "generation 4 has been over for 0 s" in said[0]
    ended.clear()
    with watch.inside(4):  # it was over before it was entered
        assert ended.wait(LONG_S)
    assert "start the site again" in said[0]


def test_who_comes_out_in_time_goes_on() -> None:
    said: list[str] = []
    watch = Deadline(LONG_S, said.append)
    before = threading.active_count()
    with watch.inside(4):
        watch.over(5)
        watch.over(6)
        assert threading.active_count() == before + 1
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(LONG_S)
    assert threading.active_count() == before
    watch.over(7)  # nobody is in a generation: a pause
    assert threading.active_count() == before
    assert said == []
