"""What strangers cost a coordinator and a node: memory, CPU and steps a second, before, during and after each attack.

    PYTHONPATH=tests:. python tests/benchmarks/strangers.py [--seconds N] [--out FILE]

The coordinator and a node that does not compute are processes of their own, and so are the strangers, which have the
lowest priority: real ones would use cores of other machines.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import psutil
import zmq
from helpers.coordinators import node, settings, swarm

from coordinator.messages import CONTROL_TAG, COORDINATOR, RUN_ID, Stop, encode
from netem import frames
from netem.endpoint import unique
from netem.keys import derived_pair, new_pair
from netem.network import Profile
from netem.profile import UNSHAPED
from netem.tables import markdown_table

MB = 10**6
PAUSE_S = 0.02
STEPS = 1_000_000
PROFILES = {"unshaped": UNSHAPED, "lte": Profile(name="lte", scope="nic", rate_bps=20e6, latency_s=0.02)}


def serve(profile: str, pipe: Connection) -> None:
    """A coordinator; it tells its address, and whenever it is asked the steps that are done."""
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm(settings(nodes=1), STEPS, Path(folder), PROFILES[profile]) as one,
    ):
        pipe.send(one.address)
        while pipe.recv():
            pipe.send((one.server._run.step, str(one.server._endpoint.door())))


def train(address: str, pipe: Connection) -> None:
    """A node that does every step at once."""
    with node(address, "node-0", settings(nodes=1)) as (session, endpoint):
        session.join()
        pipe.send((endpoint.address, endpoint.name, encode(session._join)))
        step = 0
        while not isinstance(answer := session.ready(step), Stop):
            time.sleep(PAUSE_S)
            for entry in answer.rounds:
                session.vote(entry.round_id, True, "digest")
            step = answer.step + 1


class Target(NamedTuple):
    """What strangers know: where to call, the callee's key as they believe it, and what they have heard of a member."""

    address: str
    key: str
    member: str
    join: bytes


CALLERS = 260


def call(target: Target, parts: list[bytes], name: str = "") -> None:
    """260 callers who send this without end, under names of their own or all under this one."""
    os.nice(19)
    context = zmq.Context()
    dealers = []
    for _ in range(CALLERS):
        dealer = context.socket(zmq.DEALER)
        dealer.sndhwm, dealer.linger, pair = 2, 0, new_pair()
        if target.key:
            dealer.curve_serverkey = target.key.encode()
            dealer.curve_publickey, dealer.curve_secretkey = pair.public.encode(), pair.secret.encode()
            dealer.setsockopt(95, f"X-Peer:{name or unique('node', pair.public)}".encode())
        dealer.connect(target.address)
        dealers.append(dealer)
    while True:
        for dealer in dealers:
            try:
                dealer.send_multipart(parts, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
        time.sleep(0.01)


def message(body: bytes, total_bytes: int = 0) -> list[bytes]:
    """A control message in one frame, as an endpoint writes it."""
    header = frames.Header(
        *(frames.VERSION, RUN_ID, frames.Kind.DATA, 0, 1, 0, 0, 0),
        total_bytes=total_bytes or len(body),
        checksum=zlib.crc32(body),
        tag=CONTROL_TAG,
    )
    return [frames.stamped(frames.encode(header), 0.0), body]


def flood(target: Target) -> None:
    """Frames of 1 MB, or of nearly 64 KB from those who have a key: larger ones are cut off at once."""
    call(target, message(bytes(60_000 if target.key else MB), MB))


def impersonate(target: Target) -> None:
    """All under a member's name, which has crossed in the roster, and each with a key of its own."""
    call(target, message(bytes(1000)), target.member)


def replay(target: Target) -> None:
    """All say what a member has said to join."""
    call(target, message(target.join))


def idle(target: Target) -> None:
    """500 connections that are opened again whenever they are closed, and say nothing."""
    os.nice(19)
    host, _, port = target.address.removeprefix("tcp://").rpartition(":")
    open_: list[socket.socket] = []
    while True:
        for connection in open_[:]:
            connection.setblocking(False)
            try:
                gone = connection.recv(4096) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                connection.close()
                open_.remove(connection)
        while len(open_) < 500:
            try:
                open_.append(socket.create_connection((host, int(port)), timeout=1))
            except OSError:
                break
        time.sleep(0.02)


class Attack(NamedTuple):
    """One kind of strangers, at which door, and the token that they have."""

    name: str
    at_node: bool
    token: str
    work: Callable[[Target], None]


TOKEN = settings().token
ATTACKS = (
    Attack("500 half-open connections", False, "", idle),
    Attack("260 × 1 MB, without keys", False, "", flood),
    Attack("260 × 64 KB, wrong token", False, "guess", flood),
    Attack("260 × 64 KB, right token", False, TOKEN, flood),
    Attack("260 under a member's name, right token", False, TOKEN, impersonate),
    Attack("260 replays of a member's Join, right token", False, TOKEN, replay),
    Attack("500 half-open connections at a node", True, "", idle),
    Attack("260 × 1 MB at a node", True, "", flood),
)


class Swarm:
    """The processes under attack."""

    def __init__(self, profile: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.lead = spawn.Process(target=serve, args=(profile, theirs), daemon=True)
        self.lead.start()
        self.address = self.pipe.recv()
        self.node_pipe, theirs = spawn.Pipe()
        self.node = spawn.Process(target=train, args=(self.address, theirs), daemon=True)
        self.node.start()
        self.node_address, self.member, self.join = self.node_pipe.recv()

    def steps(self) -> tuple[int, str]:
        self.pipe.send(True)
        steps, door = self.pipe.recv()
        return steps, door

    def steps_per_s(self, seconds: float, watched: psutil.Process) -> tuple[float, float, float]:
        """Steps a second, the largest memory in MB, and the share of a core, of `watched`."""
        before, began = self.steps()[0], time.monotonic()
        cpu_s, most = sum(watched.cpu_times()[:2]), 0.0
        while time.monotonic() - began < seconds:
            most = max(most, watched.memory_info().rss / MB)
            time.sleep(0.05)
        took_s = time.monotonic() - began
        return (self.steps()[0] - before) / took_s, most, (sum(watched.cpu_times()[:2]) - cpu_s) / took_s

    def close(self) -> None:
        self.node.kill()
        self.lead.kill()


def measure(profile: str, attack: Attack, seconds: float) -> list[str]:
    """The row of one attack."""
    spawn = multiprocessing.get_context("spawn")
    under = Swarm(profile)
    try:
        watched = psutil.Process(under.node.pid if attack.at_node else under.lead.pid)
        time.sleep(1.0)
        before, rested_mb, _ = under.steps_per_s(seconds / 2, watched)
        key = derived_pair(attack.token, COORDINATOR).public if attack.token else ""
        target = Target(under.node_address if attack.at_node else under.address, key, under.member, under.join)
        strangers = spawn.Process(target=attack.work, args=(target,), daemon=True)
        strangers.start()
        time.sleep(2.0)
        during, most_mb, cores = under.steps_per_s(seconds, watched)
        strangers.kill()
        strangers.join()
        time.sleep(1.0)
        after, _, _ = under.steps_per_s(seconds / 2, watched)
        print(under.steps()[1], file=sys.stderr)
    finally:
        under.close()
    figures = [f"{before:.1f}", f"{during / before:.2f}", f"{after / before:.2f}", f"{cores:.2f}"]
    return [attack.name, profile, *figures, f"{rested_mb:.0f}", f"{most_mb - rested_mb:+.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each attack (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    head = ["attack", "profile", "steps/s before", "during", "after", "cores", "MB before", "MB more"]
    rows = []
    for profile in PROFILES:
        for attack in ATTACKS:
            rows.append(measure(profile, attack, options.seconds))
            print(" | ".join(rows[-1]), flush=True)
    text = markdown_table(head, rows, align="llr")
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
