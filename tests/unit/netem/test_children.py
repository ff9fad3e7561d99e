"""Child processes: none is left behind, however its parent ends, and the one that failed first is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from netem import children as module
from netem.children import LIFELINE, Children, failed_first
from netem.errors import IsthmusError

WAIT_S = 20.0
SLEEPS = ["sleep", "60"]


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_a_child_runs_in_a_process_group_of_its_own_and_writes_its_log(tmp_path: Path) -> None:
    with Children() as children:
        log = tmp_path / "a.log"
        log.write_text("before\n")
        child = children.start("a", shell("echo out; echo error >&2"), log_path=log)
        assert child.wait(WAIT_S)
        sleeper = children.start("b", SLEEPS)
        assert os.getpgid(sleeper.pid) == sleeper.pid
        assert os.getsid(sleeper.pid) == os.getsid(0)
    assert log.read_text().splitlines() == ["before", "out", "error"]
    assert child.code == 0
    assert not child.failed


def test_the_end_ends_all_in_order() -> None:
    """Those that obey SIGTERM end by it; one that does not is killed. What was stopped from here has not failed."""
    with Children() as children:
        deaf = children.start("deaf", shell("trap '' TERM; echo ready; while :; do sleep 60; done"), talks=True)
        assert deaf.hear(WAIT_S) == b"ready\n"
        obedient = children.start("obedient", SLEEPS)
        reader = children.start("reader", ["cat"], talks=True)
        reader.tell(b"line")
        assert reader.hear(WAIT_S) == b"line\n"
        assert obedient.running
        children.end(0.2)
    assert (deaf.code, obedient.code, reader.code) == (-signal.SIGKILL, -signal.SIGTERM, 0)
    assert failed_first([deaf, obedient, reader]) is None
    children.end()  # twice is fine


def test_an_error_in_the_with_ends_all_too() -> None:
    def interrupted() -> None:
        with Children() as children:
            started.append(children.start("a", SLEEPS))
            raise KeyboardInterrupt

    started: list[module.Child] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not started[0].running


PARENT = """
import sys, time
from netem.children import Children
children = Children()
child = children.start("child", [sys.executable, "-c", sys.argv[1]], talks=True)
child.hear(60)
print(child.pid, flush=True)
time.sleep(60)
"""
OBEDIENT = (
    "from netem.children import end_with_parent; end_with_parent(); print(flush=True); import time; time.sleep(60)"
)
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {OBEDIENT}".replace(
    "end_with_parent()", "import netem.children; netem.children.ORPHAN_S = 0.1; end_with_parent()", 1
)


@pytest.mark.parametrize("child_code", [OBEDIENT, DEAF], ids=["obedient", "deaf"])
def test_a_child_ends_when_its_parent_is_killed(child_code: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, child_code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=WAIT_S)
        for process in alive:
            process.kill()
        assert not alive


def test_a_process_that_was_started_by_hand_depends_on_nobody() -> None:
    """Also where its standard input has ended."""
    code = "import netem.children, threading; netem.children.end_with_parent(); print(threading.active_count())"
    environment = {name: value for name, value in os.environ.items() if name != LIFELINE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [b"1"]


def test_a_child_does_not_hand_its_lifeline_on() -> None:
    code = (
        "import os; from netem.children import end_with_parent; end_with_parent();"
        f"print({LIFELINE!r} in os.environ, flush=True)"
    )
    with Children() as children:
        assert children.start("a", [sys.executable, "-c", code], talks=True).hear(WAIT_S) == b"False\n"


def failing(children: Children, name: str, script: str, folder: Path) -> module.Child:
    child = children.start(name, shell(script), log_path=folder / f"{name}.log")
    assert child.wait(WAIT_S)
    return child


def test_the_one_that_failed_first_is_named_with_its_reason(tmp_path: Path) -> None:
    with Children() as children:
        well = failing(children, "well", "exit 0", tmp_path)
        cause = failing(children, "cause", "echo noise; echo 'isthmus node: error: the loss is nan'; exit 1", tmp_path)
        other = failing(children, "other", "echo 'isthmus node: cause failed'; exit 1", tmp_path)
        mistake = failing(children, "mistake", "echo 'isthmus node: error: train.lr is too high'; exit 2", tmp_path)
        killed = failing(children, "killed", "kill -9 $$", tmp_path)
        assert failed_first([other, well, cause]) is cause
        assert failed_first([other, cause, mistake]) is mistake
        assert failed_first([other, cause, mistake, killed]) is killed
        assert failed_first([well]) is None
    assert cause.describe() == "cause ended with exit code 1: the loss is nan"
    assert mistake.reason() == "train.lr is too high"
    assert killed.describe() == "killed ended with signal SIGKILL"


def test_a_conversation_with_one_that_ends_or_says_nothing() -> None:
    with Children() as children:
        silent = children.start("silent", SLEEPS, talks=True)
        with pytest.raises(IsthmusError, match="silent did not answer within 0 s"):
            silent.hear(0.01)
        gone = children.start("gone", shell("exit 3"), talks=True)
        with pytest.raises(IsthmusError, match="gone ended with exit code 3"):
            gone.hear(WAIT_S)
        with pytest.raises(IsthmusError, match="gone ended with exit code 3"):
            gone.tell(b"line")
