"""Two coordinators of one run: the second is refused, and one that has lost the run ends. Machines are names here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.records.lease import LEASE, Lease, read_lease
from netem.errors import ConfigError


class Clock:
    """Sleeps that take no time; after each one, `act` may do what another machine does meanwhile."""

    def __init__(self, act: Callable[[float], None] = lambda slept_s: None) -> None:
        self.slept_s = 0.0
        self._act = act

    def __call__(self, seconds: float) -> None:
        self.slept_s += seconds
        self._act(self.slept_s)


def test_a_first_coordinator_takes_the_lease_at_once_and_gives_it_back(tmp_path: Path) -> None:
    lease, clock = Lease(tmp_path, "atlas"), Clock()
    lease.take(clock)
    assert clock.slept_s == 0
    found = read_lease(tmp_path / LEASE)
    assert found is not None
    assert (found.host, found.beats) == ("atlas", 1)
    assert (tmp_path / LEASE).stat().st_size == 512
    lease.drop()
    assert read_lease(tmp_path / LEASE) is None


def test_on_one_machine_the_lock_is_what_counts(tmp_path: Path) -> None:
    """A coordinator that was killed is started again without waiting: its lock was freed."""
    Lease(tmp_path, "atlas").take(Clock())
    clock = Clock()
    Lease(tmp_path, "atlas").take(clock)
    assert clock.slept_s == 0


def test_a_second_machine_is_refused_while_the_first_counts_up(tmp_path: Path) -> None:
    first = Lease(tmp_path, "atlas", hold_s=10.0)
    first.take(Clock())
    clock = Clock(lambda slept_s: None if slept_s < 3 else first.renew() and None)
    with pytest.raises(ConfigError, match=r"a coordinator on atlas \(pid \d+\) serves this run; stop it first"):
        Lease(tmp_path, "boreas", hold_s=10.0).take(clock)
    assert 3 <= clock.slept_s <= 4
    assert first.renew()


def test_a_second_machine_takes_over_what_nobody_counts_up(tmp_path: Path) -> None:
    first = Lease(tmp_path, "atlas", hold_s=10.0)
    first.take(Clock())
    second, clock = Lease(tmp_path, "boreas", hold_s=10.0), Clock()
    second.take(clock)
    assert clock.slept_s >= 10.0
    assert not first.renew()  # it was asleep, and has lost the run
    first.drop()  # which does not take the other's away
    found = read_lease(tmp_path / LEASE)
    assert found is not None
    assert found.host == "boreas"


def test_of_two_machines_that_take_over_at_once_only_one_stays(tmp_path: Path) -> None:
    Lease(tmp_path, "atlas", hold_s=10.0).take(Clock())
    third = Lease(tmp_path, "notos", hold_s=10.0)

    def late(slept_s: float) -> None:
        if slept_s > 10.0:
            third._write()

    with pytest.raises(ConfigError, match="a coordinator on notos"):
        Lease(tmp_path, "boreas", hold_s=10.0).take(Clock(late))
    assert third.renew()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"holder": 1}', b"[" * 100_000, b'{"host": "a"}'], ids=len)
def test_a_file_that_says_nothing_is_free(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEASE).write_bytes(content)
    assert read_lease(tmp_path / LEASE) is None
    lease = Lease(tmp_path, "atlas")
    lease.take(Clock())
    assert lease.renew()


def test_a_holder_that_has_lost_the_run_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    lost = threading.Event()

    def tell(reason: str) -> None:
        told.append(reason)
        lost.set()

    with Lease(tmp_path, "atlas", hold_s=0.1).held() as lease:
        lease.on_lost(tell)
        assert not lost.wait(0.3)
        Lease(tmp_path, "boreas")._write()
        assert lost.wait(20)
        lease.on_lost(told.append)  # it is lost already
    assert len(told) == 2
    assert "a coordinator on boreas" in told[0]
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_a_disk_that_fails_for_a_while_does_not_cost_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lease = Lease(tmp_path, "atlas")
    lease.take(Clock())
    (tmp_path / LEASE).unlink()
    (tmp_path / LEASE).mkdir()
    assert lease.renew()
    assert "cannot be written" in caplog.text
