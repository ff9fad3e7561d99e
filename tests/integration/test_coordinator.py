"""Coordinator and nodes over real endpoints on 127.0.0.1, in threads; a node that is killed is a process."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.coordinators import node, settings, swarm, train

from coordinator.messages import (
    CONTROL_TAG,
    COORDINATOR,
    RUN_ID,
    Refused,
    decode_from_coordinator,
)
from coordinator.server import RunOutcome
from netem.endpoint import Endpoint, unique
from netem.errors import ConfigError, GenerationOver, IsthmusError, RunAborted
from netem.keys import Access, derived_pair, new_pair
from netem.profile import Profile


def test_three_nodes_do_five_steps_with_a_round_each(tmp_path: Path) -> None:
    config = settings()
    with swarm(config, 5, tmp_path) as one:
        runs = [one.train(f"node-{rank}", config) for rank in range(3)]
        for run in runs:
            gos = run.result(60)
            assert [(go.step, go.cursor) for go in gos] == [(step, 2 * step) for step in range(5)]
            assert gos[0].rounds[0].weights == [0.5, 0.25, 0.25]
        assert one.outcome.result(20) == RunOutcome(True, "")
        assert one.checkpoints == [1, 2, 3, 4, 5]
        assert [record.step for record in one.records] == [1, 2, 3, 4, 5]
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_wrong_token_wrong_config_and_a_late_joiner_get_their_reasons(tmp_path: Path) -> None:
    config = settings(nodes=1)
    with swarm(config, 50, tmp_path) as one:
        with pytest.raises(ConfigError, match="it does not accept this node's key; give ISTHMUS_TOKEN"):
            one.train("other", settings(token="guess")).result(30)
        run = one.train("node-0", config, pause_s=0.05)
        while not one.checkpoints:
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=r"the run is full: it has its 1 nodes \(node-0\)"):
            one.train("node-1", config).result(30)
        assert len(run.result(60)) == 50


@pytest.mark.parametrize(("token", "reason"), [("guess", "ISTHMUS_TOKEN"), ("secret", "node-0 is already here")])
def test_a_namesake_is_told_why_and_does_the_member_no_harm(tmp_path: Path, token: str, reason: str) -> None:
    config = settings(nodes=2)
    steps = 250 if token == "guess" else 60  # a guess is told after two seconds
    with swarm(config, steps, tmp_path) as one:
        runs = [one.train(f"node-{rank}", config, pause_s=0.02) for rank in range(2)]
        while not one.checkpoints:
            time.sleep(0.02)
        for _ in range(1 if token == "guess" else 3):
            with pytest.raises(ConfigError, match=reason):
                one.train("node-0", settings(token=token)).result(30)
        assert [len(run.result(60)) for run in runs] == [steps, steps]
        assert one.outcome.result(20) == RunOutcome(True, "")
        assert {name for record in one.records for name in record.nodes} == {"node-0", "node-1"}


def test_where_a_loss_ends_the_run_a_killed_node_is_named_to_the_others_within_the_deadline(tmp_path: Path) -> None:
    config = settings(max_retries_per_step=0)
    with swarm(config, 100_000, tmp_path) as one:
        runs = [one.train(f"node-{rank}", config, pause_s=0.02) for rank in range(2)]
        victim = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "helpers" / "coordinators.py", one.address, "node-2"]
        )
        try:
            while not one.checkpoints:
                time.sleep(0.02)
            victim.send_signal(signal.SIGKILL)
            killed_s = time.monotonic()
            for run in runs:
                with pytest.raises(RunAborted, match=rf"node-2 \(pid {victim.pid} on .*\) was lost: silent for 2 s"):
                    run.result(30)
            assert 1.0 < time.monotonic() - killed_s < 6.0
            outcome = one.outcome.result(20)
            assert not outcome.ok
            assert "node-2" in outcome.reason
            assert "the last complete step is" in outcome.reason
        finally:
            victim.kill()
            victim.wait(10)


def test_a_coordinator_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"no answer from the coordinator within 0\.3 s"):
        train("tcp://127.0.0.1:9", "node-0", settings(join_timeout_s=0.3))


def test_a_coordinator_that_is_stopped_tells_its_nodes_why(tmp_path: Path) -> None:
    config = settings(nodes=1)
    with swarm(config, 100_000, tmp_path) as one:
        run = one.train("node-0", config, pause_s=0.01)
        while not one.checkpoints:
            time.sleep(0.02)
        one.server.stop("interrupted by Ctrl-C")
        with pytest.raises(RunAborted, match="interrupted by Ctrl-C; the last complete step is"):
            run.result(30)
        assert not one.outcome.result(20).ok


class Stranger:
    """Speaks control that is none, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def admit(self, peer: str, generation: int, tag: bytes, total_bytes: int) -> memoryview | None:
        return memoryview(bytearray(total_bytes))

    def deliver(self, peer: str, generation: int, tag: bytes, buffer: memoryview) -> None:
        self.told.put(bytes(buffer))

    def failed(self, error: IsthmusError) -> None:
        raise AssertionError(error)


@pytest.mark.parametrize("nonsense", ["body", "bulk"])
def test_a_stranger_who_speaks_nonsense_does_not_disturb_the_run(tmp_path: Path, nonsense: str) -> None:
    config = settings(nodes=1)
    with swarm(config, 3, tmp_path) as one:
        stranger = Stranger()
        pair = new_pair()
        endpoint = Endpoint(unique("old", pair.public), RUN_ID, Profile(), stranger, bind=None, access=Access(pair))
        try:
            endpoint.connect(COORDINATOR, one.address, key=derived_pair(config.token, COORDINATOR).public)
            endpoint.send(COORDINATOR, CONTROL_TAG if nonsense == "body" else b"bulk", [b"\x81\xa4type\xa5hello"])
            if nonsense == "body":
                answer = decode_from_coordinator(stranger.told.get(timeout=10))
                assert isinstance(answer, Refused)
                assert "not understood" in answer.reason
                assert "is it the same isthmus?" in answer.reason
            assert len(one.train("node-0", config).result(30)) == 3
        finally:
            endpoint.close()


def test_a_member_who_speaks_nonsense_is_named(tmp_path: Path) -> None:
    config = settings(nodes=1)
    with swarm(config, 3, tmp_path) as one:
        with node(one.address, "node-0", config) as (session, _endpoint):
            session.join()
            session._wire(b"\xc1")
            with pytest.raises(GenerationOver):  # it has to go, and is told why
                session.ready(0)
            ending = session._member.ending
            assert ending is not None
            assert "node-0: a control message that is not MessagePack" in ending.reason
        outcome = one.outcome.result(20)
        assert "node-0" in outcome.reason
        assert "not MessagePack" in outcome.reason
