"""What host and guests of a survey say to each other (MessagePack, as `coordinator.messages`), and the tags of probes.

They use the same tag and the same keys as a run, so that one who meets a run in place of a survey, or the other way
round, is told so.
"""

from __future__ import annotations

from typing import Annotated

import msgpack
import msgspec
from msgspec import Meta

from coordinator.messages import Address, Count, Digest, Message, Name, Peer, Refused, Text, decode
from netem.names import KeyText

Seconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
Latency = Annotated[float, Meta(ge=0, le=3600)]
Bps = Annotated[float, Meta(ge=0, le=1e15)]

MOST_GUESTS = 64


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine: what is installed, what it computes on, and what room it has. Numbers are 0 where unknown."""

    release: Text = ""
    python: Text = ""
    torch: Text = ""
    system: Text = ""
    cores: Count = 0
    shared_cores: Text = ""
    """The name of the cores (`netem.cores`): equal on machines that are one."""
    memory_bytes: Count = 0
    free_memory_bytes: Count = 0
    free_disk_bytes: Count = 0
    device: Text = ""
    """`run.device` here."""
    gpu: Text = ""
    gpu_bytes: Count = 0
    driver: Text = ""
    cuda: Text = ""
    """The version of CUDA that torch was built for; empty for none."""
    interface: Text = ""
    """The network interface that listens, and its kind, where that is known."""
    own_address: Text = ""
    """The host part of the address at which it listens, before any --advertise."""
    short_token: bool = False
    """Whether the token is so short that it could be guessed."""


class Arrive(Message, frozen=True, kw_only=True):
    """A machine wants to take part; `key`, `encrypted` and `address` as in `Join`. `config_digest` is that of its
    config, or empty without one."""

    version: Count
    name: Name
    key: KeyText = ""
    encrypted: bool = False
    address: Address
    config_digest: Digest = ""
    facts: Facts


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one guest found on its way to the guest `peer`. Counts and times are 0 where nothing was found."""

    peer: Peer
    trouble: Text = ""
    """Why no connection can be opened; empty if one was."""
    sent: Count = 0
    echoed: Count = 0
    heard: Count = 0
    """Probes that came from `peer`."""
    latency_s: Latency = 0.0
    jitter_s: Latency = 0.0
    ahead_s: Seconds = 0.0
    """By how much the peer's clock is ahead."""
    segments: Count = 0
    """TCP segments with data in the trickle, and those sent again among them; 0 where the kernel does not tell."""
    repeated: Count = 0
    rate_bps: Bps = 0.0


class Report(Message, frozen=True, kw_only=True):
    """The sender has done turn `turn`."""

    turn: Count
    links: Annotated[list[Link], Meta(max_length=MOST_GUESTS)]


class Part(Message, frozen=True, kw_only=True):
    """The sender leaves."""

    reason: Text = ""


# From the host.


class Waiting(Message, frozen=True, kw_only=True):
    """The host is there, and waits for others; `text` says for how many."""

    text: Text


class Seat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One guest."""

    name: Name
    peer: Peer
    address: Address
    key: KeyText = ""
    encrypted: bool = False


class Circle(Message, frozen=True, kw_only=True):
    """All guests are here: dial each other. `secret` is as in `Roster`."""

    secret: Annotated[str, Meta(max_length=128)] = ""
    seats: Annotated[list[Seat], Meta(min_length=1, max_length=MOST_GUESTS)]


class Turn(Message, frozen=True, kw_only=True):
    """Turn number `turn`: send to `targets` for `duration_s` seconds, and report. With `fill` the links are kept full,
    without it they carry a trickle. Whoever has no targets reports at once."""

    turn: Count
    fill: bool
    targets: Annotated[list[Peer], Meta(max_length=MOST_GUESTS)]
    duration_s: Annotated[float, Meta(gt=0, le=60)]


class Verdict(Message, frozen=True, kw_only=True):
    """The survey is over: its result for people, the network as TOML, and how many things are wrong."""

    text: Annotated[str, Meta(max_length=1 << 19)]
    profile: Annotated[str, Meta(max_length=1 << 18)] = ""
    wrong: Count = 0


FromGuest = Arrive | Report | Part
FromHost = Waiting | Circle | Turn | Verdict | Refused


def from_guest(body: bytes | bytearray | memoryview, peer: str) -> FromGuest:
    """Decode a message to the host. Raises `ProtocolError` naming `peer` and the field that is wrong."""
    message: FromGuest = decode(body, FromGuest, peer)
    return message


def from_host(body: bytes | bytearray | memoryview, peer: str) -> FromHost:
    """Decode a message of the host. Raises `ProtocolError` naming the field that is wrong."""
    message: FromHost = decode(body, FromHost, peer)
    return message


# Probes go from guest to guest. Their tag says all; the payload has no meaning.


class Probe(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="probe"):
    """Probe `number` of turn `turn`, sent at `sent_s` by the sender's clock."""

    turn: Count
    number: Count
    sent_s: Seconds


class Echoed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="echo"):
    """The answer to a probe: it came and the answer left at these times, by the clock of the one who answers."""

    turn: Count
    number: Count
    sent_s: Seconds
    came_s: Seconds
    echoed_s: Seconds


def probe_tag(message: Probe | Echoed) -> bytes:
    """The tag of a probe or an echo."""
    tag: bytes = msgpack.packb(msgspec.to_builtins(message))
    return tag


def read_probe(tag: bytes, peer: str) -> Probe | Echoed:
    """Decode a tag. Raises `ProtocolError`."""
    message: Probe | Echoed = decode(tag, Probe | Echoed, peer)
    return message
