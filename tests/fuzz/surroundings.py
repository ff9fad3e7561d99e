"""Targets beside a run: a survey of machines (`isthmus doctor`), and the files of checkpoints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from coordinator.files.collector import MOST_OF_A_PEER, Collector
from coordinator.files.depot import Depot
from coordinator.files.messages import (
    PIECE_BYTES,
    About,
    Fetch,
    Offer,
    Piece,
    Taken,
    Want,
    file_tag,
    read_file_tag,
)
from coordinator.messages import PROTOCOL_VERSION, encode
from coordinator.survey.guest import Guest
from coordinator.survey.host import Host, Judge
from coordinator.survey.messages import (
    Arrive,
    Circle,
    Echoed,
    Facts,
    Link,
    Part,
    Probe,
    Report,
    Seat,
    Turn,
    Verdict,
    from_guest,
    from_host,
    probe_tag,
    read_probe,
)
from netem.errors import ProtocolError
from node.lab.doctor.page import judge

NAMES = ("ann", "bob", "cyd")


def survey(parts: list[bytes]) -> None:
    """Messages of three machines to a host of two; the first byte of each says which, and what time. What the host
    makes of it in the end can be shown."""
    host, now_s = Host(2, 60.0, "", 0.0), 0.0
    for part in parts:
        if not part:
            return
        peer = NAMES[part[0] % len(NAMES)]
        now_s += (part[0] >> 2) / 4
        try:
            actions = host.receive(peer, from_guest(part[1:], peer), "10.0.0.1", now_s)
        except ProtocolError:
            actions = host.lost(peer, "nonsense", now_s) if part[0] & 128 else []
        for action in [*actions, *host.tick(now_s)]:
            if isinstance(action, Judge):
                assert len(action.survey.guests) <= 2
                assert encode(judge(action.survey, None))


def guest(parts: list[bytes]) -> None:
    """What a host and another guest say to a guest."""
    one, now_s = Guest("ann", _arrive("ann"), 20.0, 0.0), 0.0
    for part in parts:
        now_s += 0.1
        with suppress(ProtocolError):
            one.told(from_host(part, "coordinator"), now_s)
        try:
            shot = read_probe(part, "bob")
        except ProtocolError:
            shot = None
        if isinstance(shot, Probe):
            one.probed("bob", shot, now_s, now_s)
        elif isinstance(shot, Echoed):
            one.echoed("bob", shot, now_s, now_s)
        assert len(one.tick(now_s)) < 10_000


class _Disk(Depot):
    """A disk on which everything has room and nothing is written."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    def offer(self, file: About) -> Offer | None:
        return Offer(file.step, file.name, 5, "0" * 32) if file.step == 1 else None

    def begin(self, offer: Offer) -> str:
        return ""

    def write(self, file: About, offset: int, data: memoryview) -> None:
        assert 0 <= offset < offset + len(data) <= 1 << 42

    def finish(self, file: About) -> None:
        assert "/" not in file.name

    def drop(self, file: About) -> None:
        assert "/" not in file.name

    def read(self, file: About, offset: int) -> bytes:
        return b"x" * 5 if file.step == 1 else b""


def files(parts: list[bytes]) -> None:
    """What two members say to the coordinator about files: a tag, and a payload of the length that its first two bytes
    say."""
    collector, now_s = Collector(_Disk(), 100), 0.0
    for part in parts:
        now_s += 1.0
        peer = NAMES[part[0] & 1] if part else "ann"
        nbytes = min(int.from_bytes(part[1:3], "big"), PIECE_BYTES)
        try:
            message = read_file_tag(part[3:], nbytes, peer)
        except ProtocolError:
            continue
        replies = collector.receive(peer, message, memoryview(bytes(nbytes)), now_s) + collector.tick(now_s)
        assert len(replies) <= 2 * MOST_OF_A_PEER * 20


def _arrive(name: str) -> Arrive:
    facts = Facts(own_address="10.0.0.1", device="cpu")
    return Arrive(version=PROTOCOL_VERSION, name=name, address="tcp://10.0.0.1:7071", facts=facts)


def _said(who: int, message: Arrive | Report | Part) -> bytes:
    return bytes([who + 3 * 8]) + encode(message)


def examples() -> dict[str, list[list[bytes]]]:
    """Well-formed inputs, as parts."""
    sound = {"sent": 9, "echoed": 9, "heard": 9, "latency_s": 0.01, "segments": 90, "rate_bps": 5e7}
    arrivals = [_said(0, _arrive("ann")), _said(1, _arrive("bob"))]
    reports = [
        _said(who, Report(turn=turn, links=[Link(peer=NAMES[1 - who], **sound)])) for turn in range(5) for who in (0, 1)
    ]
    circle = Circle(seats=[Seat(name=name, peer=name, address="tcp://10.0.0.1:7071") for name in NAMES[:2]])
    told = [
        encode(circle),
        encode(Turn(turn=0, fill=False, targets=["bob"], duration_s=0.1)),
        probe_tag(Probe(0, 0, 1.0)),
        probe_tag(Echoed(0, 0, 0.2, 1.0, 1.0)),
        encode(Turn(turn=1, fill=True, targets=["bob"], duration_s=0.1)),
        probe_tag(Echoed(1, 0, 0.4, 1.0, 1.0)),
        encode(Verdict(text="done")),
    ]
    name = "node-0.safetensors"
    said = [
        (0, Offer(2, name, PIECE_BYTES + 5, "a" * 32)),
        (PIECE_BYTES, Piece(2, name, 0)),
        (5, Piece(2, name, PIECE_BYTES)),
        (0, Fetch(1, name)),
        (0, Want(1, name, 0)),
        (0, Taken(1, name)),
    ]
    return {
        "survey": [[*arrivals, *reports], [*arrivals, _said(1, Part(reason="tired"))]],
        "guest": [told],
        "files": [[b"\0" + nbytes.to_bytes(2, "big") + file_tag(message) for nbytes, message in said]],
    }
