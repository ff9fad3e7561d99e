"""A running network that changes, over real sockets: what is sent arrives, each message once, in order."""

from __future__ import annotations

import time

import pytest
from helpers.endpoints import PATIENCE_S, network

from netem.changes import Cut, Heal
from netem.errors import ConfigError, PeerSilent
from netem.limits import Limits
from netem.network import CUT_BPS, Pair, Profile
from netem.schedule import Schedule, Timed

pytestmark = pytest.mark.alone

MB = 10**6
SLOW = Profile(rate_bps=10e6, latency_s=0.01)
FAST = Profile(rate_bps=1e9, latency_s=0.01)
CUT = Profile(rate_bps=1e9, latency_s=0.01, pairs=(Pair("*", "*", has_rate=True, rate_bps=CUT_BPS),))


@pytest.mark.parametrize("scope", ["link", "nic"])
def test_a_transfer_that_would_take_a_minute_ends_soon_after_its_link_grows_fast(scope: str) -> None:
    slow, fast = (Profile(scope=scope, rate_bps=rate_bps, latency_s=0.01) for rate_bps in (10e6, 1e9))
    with network("a", "b", profile=slow) as (endpoints, inboxes):
        start = time.monotonic()
        endpoints["a"].send("b", b"long", [bytes(80 * MB)])
        time.sleep(0.3)
        for endpoint in endpoints.values():
            endpoint.reshape(fast)
        assert inboxes["b"].next().tag == b"long"
        assert 0.3 + 0.6 < time.monotonic() - start < 0.5 * 64
        assert endpoints["a"].counters()["b"].resent_bytes == 0


def test_what_is_sent_into_a_cut_arrives_when_it_is_healed() -> None:
    with network("a", "b", profile=FAST) as (endpoints, inboxes):
        endpoints["a"].send("b", b"first", [bytes(30 * MB)])
        for endpoint in endpoints.values():
            endpoint.reshape(CUT)
        endpoints["a"].send("b", b"second", [bytes(MB)])
        endpoints["a"].send("b", b"word", urgent=True)
        assert not endpoints["a"].flush(0.5)
        assert inboxes["b"].deliveries.empty()
        for endpoint in endpoints.values():
            endpoint.reshape(FAST)
        assert [inboxes["b"].next().tag for _ in range(3)] == [b"word", b"first", b"second"]
        assert endpoints["a"].flush(PATIENCE_S)
        assert endpoints["a"].counters()["b"].messages == 4


def test_an_endpoint_follows_its_schedule() -> None:
    cut = Timed(at_s=0.0, change=Cut(ends=("a", "*")))
    healed = Timed(at_s=0.6, change=Heal())
    with network("a", "b", profile=FAST) as (endpoints, inboxes):
        began = time.monotonic()
        for endpoint in endpoints.values():
            endpoint.follow(Schedule(FAST).with_timed([cut, healed]), began)
        endpoints["a"].send("b", b"first", [bytes(MB)])
        endpoints["a"].send("b", b"word", urgent=True)
        assert [inboxes["b"].next().tag for _ in range(2)] == [b"word", b"first"]
        assert time.monotonic() - began > 0.6
        assert endpoints["a"].counters()["b"].resent_bytes == 0


def test_a_peer_behind_a_cut_is_silent() -> None:
    with network("a", "b", profile=FAST, limits=Limits(silent_s=0.5)) as (endpoints, inboxes):
        for endpoint in endpoints.values():
            endpoint.reshape(CUT)
        endpoints["a"].send("b", b"anybody there")
        error = inboxes["a"].next_error()
        assert isinstance(error, PeerSilent)
        assert error.peer == "b"


def test_jitter_and_loss_delay_and_lose_nothing() -> None:
    shaky = Profile(rate_bps=1e9, latency_s=0.01, jitter_s=0.01, loss=0.001)
    with network("a", "b", profile=shaky) as (endpoints, inboxes):
        for number in range(40):
            endpoints["a"].send("b", bytes([number]), [bytes(100_000)])
        assert [inboxes["b"].next().tag for _ in range(40)] == [bytes([number]) for number in range(40)]


def test_scope_and_dilation_hold_for_a_whole_run() -> None:
    with network("a", "b", profile=FAST) as (endpoints, _):
        with pytest.raises(ConfigError, match=r"net\.scope = 'nic': expected 'link'"):
            endpoints["a"].reshape(Profile(scope="nic"))
        with pytest.raises(ConfigError, match=r"net\.dilation = 2\.0: expected 1\.0"):
            endpoints["a"].reshape(SLOW.dilated(2.0))
