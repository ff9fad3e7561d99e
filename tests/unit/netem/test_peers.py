"""The endpoint's peer table: how many strangers it holds, which one goes first, and where their counts go."""

import pytest
from helpers.fake_wire import LIMITS, lane_of

from netem.assembly import Assembler, Receiver
from netem.counters import LinkCounters
from netem.peers import STRANGERS, Peer, Peers
from netem.profile import Profile
from netem.shaper import Shaper


class Table:
    """Peers as an engine has them: a stranger that is evicted is removed."""

    def __init__(self, receiver: Receiver, max_strangers: int) -> None:
        self.evicted: list[str] = []
        self._receiver = receiver
        self.peers = Peers(max_strangers, self._open, self._evict)

    def _open(self, name: str, counters: LinkCounters) -> Peer:
        lane = lane_of(Shaper("a", Profile()), name)
        return Peer(lane.link, lane, Assembler(name, self._receiver, LIMITS), counters)

    def _evict(self, name: str) -> None:
        self.evicted.append(name)
        self.peers.remove(name)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.peers]


class Deaf:
    """A receiver that is never called."""

    admit = deliver = failed = None


def table(max_strangers: int = 2) -> Table:
    return Table(Deaf(), max_strangers)


def test_a_peer_is_met_once() -> None:
    peers = table().peers
    assert peers.meet("x") is peers.meet("x") is peers.hear("x", 0)
    assert "x" in peers
    assert "y" not in peers


def test_the_stranger_longest_unheard_makes_room_for_a_new_one() -> None:
    one = table()
    for name in "xy":
        one.peers.hear(name, 0)
    one.peers.hear("x", 0)
    one.peers.hear("z", 0)
    assert (one.evicted, one.names) == (["y"], ["x", "z"])


def test_meeting_is_not_hearing() -> None:
    """What we send to a stranger does not make it younger."""
    one = table()
    for name in "xy":
        one.peers.hear(name, 0)
    one.peers.meet("x")
    one.peers.meet("z")
    assert one.evicted == ["x"]


def test_no_stranger_displaces_a_peer_that_is_trusted() -> None:
    one = table()
    for name in "abc":
        one.peers.trust(name)
    for name in "vwxyz":
        one.peers.hear(name, 0)
    assert one.names == ["a", "b", "c", "y", "z"]


def test_a_stranger_that_is_trusted_makes_room_among_the_strangers() -> None:
    one = table()
    for name in "xy":
        one.peers.hear(name, 0)
    one.peers.trust("x")
    one.peers.trust("x")
    one.peers.hear("z", 0)
    assert one.evicted == []


def test_a_peer_that_is_trusted_stays_so_when_it_speaks() -> None:
    one = table(max_strangers=1)
    one.peers.trust("a")
    one.peers.hear("a", 0)
    one.peers.hear("x", 0)
    one.peers.hear("y", 0)
    assert one.names == ["a", "y"]


@pytest.mark.parametrize("name", ["", "\0abc"])
def test_who_has_no_name_is_not_met(name: str) -> None:
    assert not table().peers.may_meet(name)


def test_without_room_for_strangers_only_those_are_met_that_are_known() -> None:
    one = table(max_strangers=0)
    assert not one.peers.may_meet("x")
    one.peers.trust("a")
    one.peers.trust("b")
    assert one.peers.may_meet("a")
    assert one.evicted == []
    assert table(max_strangers=1).peers.may_meet("x")


def test_counts_of_a_known_peer_outlast_it_and_go_on_when_it_returns() -> None:
    one = table()
    one.peers.trust("a")
    one.peers.counters_of("a").messages += 3
    assert one.peers.remove("a")
    assert not one.peers.remove("a")
    one.peers.trust("a")
    one.peers.meet("a").counters.messages += 1
    assert one.peers.counters()["a"].messages == 4


def test_counts_of_strangers_that_are_gone_are_added_up_in_one_entry() -> None:
    one = table(max_strangers=1)
    for name in "xyz":
        one.peers.hear(name, 10)
    counters = one.peers.counters()
    assert sorted(counters) == [STRANGERS, "z"]
    assert counters[STRANGERS].received_wire_bytes == 20


def test_frames_that_are_refused_are_counted_for_a_peer_or_for_all_strangers_together() -> None:
    peers = table().peers
    peers.hear("x", 0)
    for name in ("x", "u", "v"):
        peers.refuse(name, 7)
    counters = peers.counters()
    assert {name: (one.dropped, one.received_wire_bytes) for name, one in counters.items()} == {
        "x": (1, 7),
        STRANGERS: (2, 14),
    }


def test_counters_are_a_copy() -> None:
    peers = table().peers
    peers.hear("x", 0)
    peers.counters()["x"].messages = 5
    assert peers.counters()["x"].messages == 0
    assert peers.counters_of("x").messages == 0


def test_peers_may_be_removed_while_they_are_walked() -> None:
    one = table()
    for name in "ab":
        one.peers.trust(name)
    for name, _ in one.peers:
        one.peers.remove(name)
    assert one.names == []


def test_the_largest_window_that_a_peer_has_had_is_kept() -> None:
    peer = table().peers.meet("x")
    assert peer.most_window_bytes == peer.link.peer_window_bytes
