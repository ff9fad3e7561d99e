"""The peers of the benchmark, as real processes: each computes what one process computes. And the shaped wire."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from netem.verify.kernel import unavailable
from netem.verify.lan import Host, lan
from node.config import load_config, save_config
from node.lab.bench.arms import PEERS
from node.lab.bench.peers import peers
from node.lab.bench.wire import measure_wire

pytestmark = pytest.mark.alone

LOOPBACK = Host((), "127.0.0.1")
FLOAT32_OFF, BF16_OFF = 2e-6, 1e-2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_every_peer_has_the_loss_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    """With grouped-query attention, on two ranks."""
    settings = ["--model.layers=2", "--model.context=128", "--net.profile=unshaped"]
    save_config(load_config(ROOT / "configs" / "tiny.toml", settings), tmp_path / "tiny.toml")
    with peers([LOOPBACK] * 2, "lo", tmp_path / "tiny.toml", tmp_path / "peers.log", free_port()) as ranks:
        for arm in PEERS:
            off = ranks.check(arm)
            if isinstance(off, str):
                assert arm.method == "ring", f"{arm.name}: {off}"  # private parts of torch, which may change
                continue
            assert off["loss"] < (1e-6 if arm.wire == "float32" else 1e-4), arm.name
            assert off["gradient"] < (FLOAT32_OFF if arm.wire == "float32" else BF16_OFF), arm.name
            if arm.wire == "bfloat16":
                assert off["gradient"] > FLOAT32_OFF, f"{arm.name} sends float32"
        assert all(time_s > 0 for time_s in ranks.steps_s(PEERS[0], 2))


def test_hosts_on_a_bridge_keep_to_the_rate_and_leave_nothing_behind() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, check=True).stdout
    with lan(3, 200e6) as net:
        rows = measure_wire(net, (2_000_000,), 1)
    assert {(row.carrier, row.pattern) for row in rows} == {
        *(("isthmus", pattern) for pattern in ("one to one", "each to each")),
        *(("ZeroMQ", pattern) for pattern in ("one to one", "each to each")),
        ("TCP", "one to one"),
    }
    for row in rows:
        assert 0.2 < row.payload_share < row.utilisation < 1.1, row
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, check=True).stdout == before
