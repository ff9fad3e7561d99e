"""The measuring processes, and the kernel's bucket where this machine lets us: what holds on a busy machine too.

How true a network is here is `isthmus net verify`'s to say, on a machine that does nothing else. Here: nothing comes
sooner than promised, what is measured is complete, and whatever happens nothing is left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from netem.errors import IsthmusError
from netem.network import Profile
from netem.verify.child import Part
from netem.verify.kernel import kernel, unavailable
from netem.verify.measure import clock_row, endpoints, kernel_rows, time_transfers, took_s
from netem.verify.party import Party, busy_cores
from netem.verify.promise import Host, Promise

pytestmark = pytest.mark.alone

HOST = Host(1e10, 1e10, 0.0, 0.0, 2)
RATE_BPS = 100e6
LATENCY_S = 0.02
HOME = Profile(name="home", rate_bps=RATE_BPS, latency_s=LATENCY_S)


@pytest.fixture(scope="module")
def kernel_here() -> None:
    """Skips where there is no reference by the kernel."""
    if (why := unavailable()) is not None:
        pytest.skip(why)


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout


@pytest.mark.parametrize("flows", [1, 4])
def test_a_shaped_transfer_between_processes_is_not_there_before_it_is_promised(flows: int) -> None:
    before = children()
    with endpoints(HOME, ("node-0", "node-1"), 500_000) as parties:
        row = clock_row(parties, HOME, Promise(RATE_BPS, LATENCY_S), 500_000, flows, False, HOST, repeats=2)
    assert row.promised_s > LATENCY_S + 500_000 * flows * 8 / RATE_BPS  # headers come on top
    assert row.error is not None
    assert -0.9 < row.error < 0.005
    assert (row.profile, row.bytes, row.flows, row.reference, row.judged) == ("home", 500_000, flows, "clock", True)
    assert children() == before


def test_several_senders_and_several_messages_are_all_waited_for() -> None:
    with endpoints(HOME, ("a", "b", "c"), 100_000) as parties:
        sends = {"a": [Part("c", 0, 100_000, 3), Part("c", 1, 50_000)], "b": [Part("c", 0, 100_000)]}
        (sample,) = time_transfers(sends, parties, Promise(RATE_BPS, LATENCY_S), 1)
    arrivals = sample[1]["c"].arrivals
    assert {(arrival.peer, arrival.flow) for arrival in arrivals} == {("a", 0), ("a", 1), ("b", 0)}
    assert sample[1]["a"].wire_bytes > 350_000
    assert took_s(sample) > LATENCY_S + 350_000 * 8 / RATE_BPS


def test_a_process_that_dies_is_an_error_and_the_others_are_ended() -> None:
    before = children()

    def transfer_to_the_dead() -> None:
        with endpoints(HOME, ("node-0", "node-1"), 1000) as parties:
            youngest = max((psutil.Process(pid) for pid in children() - before), key=psutil.Process.create_time)
            youngest.kill()
            while youngest.is_running() and youngest.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)  # else it may still take the command in, and its peer waits for it
            time_transfers({"node-0": [Part("node-1", 0, 10)]}, parties, Promise(None), 1)

    with pytest.raises(IsthmusError, match=r"node-1 ended with signal SIGKILL"):
        transfer_to_the_dead()
    assert children() == before


def test_what_a_process_cannot_do_is_said_in_its_words() -> None:
    with pytest.raises(IsthmusError, match=r"a: .*203\.0\.113\.1"):
        Party("a", "endpoint", HOME, 10, host="203.0.113.1")


def test_busy_cores_are_busy_and_then_idle_again() -> None:
    before = children()
    with busy_cores():
        workers = [psutil.Process(pid) for pid in children() - before]
        spent_s = [sum(worker.cpu_times()[:2]) for worker in workers]
        time.sleep(0.5)
        assert len(workers) == psutil.cpu_count()
        assert all(sum(w.cpu_times()[:2]) > s for w, s in zip(workers, spent_s, strict=True))
    assert children() == before


@pytest.mark.usefixtures("kernel_here")
def test_the_kernels_bucket_keeps_its_rate_and_all_bytes_are_counted() -> None:
    before = namespaces()
    rows = kernel_rows("home", RATE_BPS, [(1_000_000, 1), (300_000, 4), (1000, 1)], False, HOST, quick=True)
    assert [(row.bytes, row.flows, row.reference) for row in rows] == [(1_000_000, 1, "tbf"), (300_000, 4, "tbf")]
    for row in rows:
        assert row.error is not None
        assert -0.9 < row.error < 0.02
        # Ethernet, IP and TCP add 66 bytes to every 1448; the burst is for nothing.
        assert row.promised_s > (row.bytes * row.flows * 1.04 - 2 * 16_000) * 8 / RATE_BPS * 0.95
    assert namespaces() == before


@pytest.mark.usefixtures("kernel_here")
def test_no_namespace_is_left_behind_by_a_failure() -> None:
    before = namespaces()

    def fail_inside() -> None:
        with kernel(RATE_BPS):
            assert namespaces() != before
            raise IsthmusError("broke")

    def fail_outside() -> None:
        with kernel(0.0):
            pytest.fail("a bucket without a rate")

    with pytest.raises(IsthmusError, match="broke"):
        fail_inside()
    with pytest.raises(IsthmusError, match=r"tc .*qdisc add"):
        fail_outside()
    assert namespaces() == before


def test_the_kernel_is_skipped_by_name_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    why = unavailable()
    assert why is not None
    assert why.startswith("kernel tbf needs ")


@pytest.mark.slow
def test_the_command_prints_one_object_and_its_exit_code_is_the_verdict() -> None:
    command = [sys.executable, "-m", "node.cli", "net", "verify", "--quick", "--json", "--profile"]
    done = subprocess.run([*command, "datacenter-100gbps"], capture_output=True, text=True, timeout=110, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["verdict"]) == (1, "untrusted")
    assert "100 Gbit/s" in told["reason"]
    assert "--net.dilation" in told["reason"]
    assert {row["busy"] for row in told["rows"]} == {False, True}
    assert {row["flows"] for row in told["rows"]} == {1, 4}
