"""`isthmus watch` on a run's folder and on a coordinator's answers, without a terminal and without sockets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.keyring import OperatorKeys
from coordinator.messages import COORDINATOR, Watched
from coordinator.records.folder import CONFIG, METRICS
from coordinator.records.lock import SERVING, is_locked, locked
from netem.errors import ConfigError
from netem.keys import derived_pair
from node.cli import main
from node.config import load_config, public_toml

NODE = {"tokens": 256.0, "step_s": 2.0}
TEXT = public_toml(
    load_config(
        None,
        [
            *("--train.steps=3", "--coordinator.nodes=2", "--compress.mode=dense", "--train.lr_warmup_steps=0"),
            *("--coordinator.address=tcp://eth0:7070", "--coordinator.token=secret"),
        ],
    )
)


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "time": 1000.0 + step, "loss": 4.0 - step, "nodes": {"node-0": NODE}, **more})


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.commands.watch.POLL_S", 0.001)
    monkeypatch.setattr("node.commands.watch.ASK_EVERY_S", 0.001)
    monkeypatch.setattr("node.watch.view.PLAIN_INTERVAL_S", 0.0)


class Operator:
    """The coordinator's answers, one after another; then it has gone."""

    def __init__(self, *answers: Watched) -> None:
        self.answers = list(answers)
        self.asked: list[int] = []

    def __call__(self, address: str, keys: OperatorKeys) -> Operator:
        self.opened = (address, keys.coordinator)
        return self

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def watch(self, after: int) -> Watched:
        self.asked.append(after)
        if not self.answers:
            raise ConfigError("nobody answers at tcp://127.0.0.1:9")
        return self.answers.pop(0)


def watched(number: int, *lines: str, state: str = "a step is being computed", config: str = TEXT) -> Watched:
    return Watched(config=config, lines=list(lines), number=number, elapsed_s=75.0, state=state)


def from_afar(monkeypatch: pytest.MonkeyPatch, *answers: Watched) -> tuple[int, Operator]:
    operator = Operator(*answers)
    monkeypatch.setattr("node.commands.watch.Operator", operator)
    monkeypatch.setenv("ISTHMUS_TOKEN", "secret")
    return main(["watch", "tcp://127.0.0.1:9"]), operator


def test_a_run_is_followed_from_afar_to_its_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joining = watched(0, state="1 of 2 nodes joined: node-0; still waiting for node-1")
    code, operator = from_afar(monkeypatch, joining, watched(1, line(1)), watched(3, line(2), line(3)))
    assert code == 0
    assert operator.opened == ("tcp://127.0.0.1:9", derived_pair("secret", COORDINATOR).public)
    assert (operator.asked, operator.closed) == ([0, 0, 1], True)
    shown = capsys.readouterr().out
    assert "2 nodes: dense" in shown
    assert shown.index("still waiting for node-1") < shown.index("step 1/3") < shown.index("step 3/3")
    assert "loss 1.000" in shown


def test_a_coordinator_that_goes_before_the_last_step_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = from_afar(monkeypatch, watched(2, line(1), line(2)))
    assert code == 1
    assert "the last step seen is 2 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (watched(1, "[]"), "expected a record"),
        (watched(1, config="= 5"), "a config that is not TOML"),
        (watched(1, config="[train]\nstepz = 5"), "stepz"),
    ],
)
def test_nonsense_from_the_coordinator_is_one_line(
    answer: Watched, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, operator = from_afar(monkeypatch, answer)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert operator.closed
    assert message in error
    assert len(error.splitlines()) == 1


def run_folder(folder: Path, *lines: str) -> Path:
    (folder / CONFIG).write_text(TEXT)
    (folder / METRICS).write_text("".join(f"{text}\n" for text in lines))
    return folder


def test_a_finished_run_is_shown_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run_folder(tmp_path, line(1), line(2), line(3)))]) == 0
    assert "step 3/3" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run_folder(tmp_path, line(1)))]) == 1
    found = capsys.readouterr()
    assert "step 1/3" in found.out
    assert f"no coordinator serves {tmp_path} now; the last step recorded is 1 of 3" in found.err


def test_where_there_is_no_run_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2
    assert CONFIG in capsys.readouterr().err


def test_a_look_at_the_lock_makes_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, SERVING):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
