"""Output in any encoding, a reader that stops reading, and Ctrl-C while modules are imported."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import node.__main__ as entry
import node.cli
from node.cli import OUTPUT_CLOSED, main


def test_what_the_encoding_lacks_is_written_in_letters_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))  # as PYTHONIOENCODING=ascii makes it
    text = "8 × A100 … 25 µs, 25 μs, θ ≤ 0.5 → Ū; André, 中"
    monkeypatch.setitem(node.cli._COMMANDS, "settings", lambda *_: print(text))
    assert main(["settings"]) == 0
    assert raw.getvalue() == b"8 x A100 ... 25 us, 25 us, theta <= 0.5 -> U; Andre, ?\n"


@contextlib.contextmanager
def _closed_pipe(monkeypatch: pytest.MonkeyPatch, *, write_through: bool) -> Iterator[None]:
    """Standard output into a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        stream.reconfigure(write_through=write_through)
        monkeypatch.setattr("sys.stdout", stream)
        yield
        monkeypatch.undo()


@pytest.mark.parametrize("write_through", [False, True])
@pytest.mark.parametrize("arguments", [["settings"], ["settings", "run"], ["completion", "bash"], ["run", "--help"]])
def test_a_reader_that_stops_ends_the_command_quietly(
    arguments: list[str], write_through: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # argparse ends the process itself after --help, and ignores what it cannot write.
    with _closed_pipe(monkeypatch, write_through=write_through), contextlib.suppress(SystemExit):
        assert main(arguments) == OUTPUT_CLOSED
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_a_fault_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError("a child's")

    monkeypatch.setitem(node.cli._COMMANDS, "settings", fail)
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(BrokenPipeError, match="a child's"):
            main(["settings"])
        monkeypatch.undo()


class _ExitError(Exception):
    pass


@pytest.fixture
def interruptible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The entry point's handler of Ctrl-C, with an exit that can be seen."""

    def leave(code: int) -> None:
        raise _ExitError(code)

    monkeypatch.setattr("os._exit", leave)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, entry.interrupt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module during whose import the user presses Ctrl-C."""
    (tmp_path / "slow_to_import.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "slow_to_import"


def test_ctrl_c_during_an_import_ends_the_process(
    interruptible: None, slow_module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(_ExitError, match="130"):
        importlib.import_module(slow_module)
    assert capfd.readouterr().err == "isthmus: interrupted\n"


def test_ctrl_c_elsewhere_is_an_interrupt_that_commands_clean_up_after(interruptible: None, slow_module: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # a command has started something
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(slow_module)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
