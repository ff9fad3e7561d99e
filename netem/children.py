"""Child processes that are never left behind.

`Children` starts processes in process groups of their own, so that Ctrl-C reaches only the process that started them.
They share its session, since Linux gives each session an equal part of the cores, and priorities count only within one.
When its `with` ends, it ends them all: it closes their input, terminates those that still run, and kills those that do
not obey in time. If the parent itself is killed, a pipe that only the parent holds open is closed, and each child ends:
`end_with_parent`, which a child calls first, watches that pipe. A process that was started by hand has no such pipe,
and does not depend on the shell that started it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from netem.errors import IsthmusError

log = logging.getLogger("isthmus.children")

LIFELINE = "ISTHMUS_LIFELINE"
"""The environment variable that tells a child which file descriptor to watch."""
USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""
GRACE_S = 2.5
"""How long a process may take to end after SIGTERM, before it is killed."""
INPUT_GRACE_S = 1.0
"""How long a process that takes commands may take to end after its input is closed, before it is terminated."""
ORPHAN_S = 4.0
"""How long a process may outlive its parent."""
LINES_SHOWN = 12


class Child:
    """One process. `code` is its exit code, or minus the number of the signal that ended it; None while it runs.

    `ended_s` is the monotonic time at which it ended; `log_path` is the file that its output goes to, if there is one.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log_path: Path | None) -> None:
        self.name = name
        self.log_path = log_path
        self.ended_s: float | None = None
        self.code: int | None = None
        self._process = process
        self._stopped = False
        self._ended = threading.Event()
        # A thread that waits knows the order in which processes end better than a look now and then.
        threading.Thread(target=self._await, name=f"waits for {name}", daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended.is_set()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well, and not because it was stopped from here."""
        return bool(self.code) and not self._stopped

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; whether it has come."""
        return self._ended.wait(max(0.0, timeout_s))

    def terminate(self) -> None:
        """Ask it to end."""
        self._stop(subprocess.Popen.terminate)

    def kill(self) -> None:
        """End it by force."""
        self._stop(subprocess.Popen.kill)

    def tell(self, line: bytes) -> None:
        """Write one line to its input. Raises `IsthmusError` where the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.wait(GRACE_S)
            raise IsthmusError(self.describe()) from None

    def hear(self, timeout_s: float) -> bytes:
        """Read one line of its output. Raises `IsthmusError` where the process ends, or says nothing in time and is
        killed for it."""
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(timeout_s, give_up)  # a read of a pipe has no time limit of its own
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return line
        self.wait(GRACE_S)
        raise IsthmusError(f"{self.name} did not answer within {timeout_s:.0f} s" if late.is_set() else self.describe())

    def tail(self) -> list[str]:
        """The last lines of its log."""
        if self.log_path is None or not self.log_path.exists():
            return []
        return self.log_path.read_text(errors="replace").splitlines()[-LINES_SHOWN:]

    def reason(self) -> str:
        """The last line of its log, without the command's name: what a process that failed says of it."""
        said = [line for line in self.tail() if line.strip()]
        return re.sub(r"^(isthmus [a-z]+: )?(error: )?", "", said[-1].strip()) if said else ""

    def describe(self) -> str:
        """How it ended, and why: "node-1 ended with exit code 1: the loss is nan". A process that a signal ended could
        not say why."""
        if self.code is None:
            return f"{self.name} has closed its input or output"
        if self.code < 0:
            return f"{self.name} ended with signal {signal.Signals(-self.code).name}"
        reason = self.reason()
        return f"{self.name} ended with exit code {self.code}{f': {reason}' if reason else ''}"

    def close_input(self) -> bool:
        """Close its input; whether it had one."""
        if self._process.stdin is None or self._process.stdin.closed:
            return False
        with suppress(BrokenPipeError):  # a line was under way to a process that has ended
            self._process.stdin.close()
        return True

    def close_output(self) -> None:
        """Close what its output is read from, if that is a pipe."""
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _stop(self, stop: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self.running:
            self._stopped = True
            stop(self._process)

    def _await(self) -> None:
        code = self._process.wait()
        self.code, self.ended_s = code, time.monotonic()
        self._ended.set()


class Children:
    """The processes that this one has started; when its `with` ends, none of them is left."""

    def __init__(self) -> None:
        self._all: list[Child] = []
        self._watched, self._held = os.pipe()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> Child:
        """Start one process. What it prints is appended to `log_path`, or goes where this process's output goes.

        With `talks`, its input and output are pipes for `Child.tell` and `Child.hear`, and only its errors are logged;
        without, it has no input. `environment` takes the place of this process's own.
        """
        own = os.environ if environment is None else environment
        out = None if log_path is None else log_path.open("ab")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else out,
                stderr=out if talks or out is None else subprocess.STDOUT,
                env={**own, LIFELINE: str(self._watched)},
                pass_fds=(self._watched,),
                process_group=0,
            )
        finally:
            if out is not None:
                out.close()
        child = Child(name, process, log_path)
        self._all.append(child)
        return child

    def await_all(self, timeout_s: float) -> bool:
        """Wait for the end of all; whether it has come."""
        deadline = time.monotonic() + timeout_s
        return all(child.wait(deadline - time.monotonic()) for child in self._all)

    def end(self, grace_s: float = GRACE_S) -> None:
        """Leave no process behind: close their input, terminate those that still run, then kill them. Twice is fine."""
        obedient = [child for child in self._all if child.close_input()]
        if obedient:
            self.await_all(INPUT_GRACE_S)
        for stop in (Child.terminate, Child.kill):
            for child in self._all:
                stop(child)
            if self.await_all(grace_s):
                break
        for child in self._all:
            child.close_output()
        self._all.clear()
        for descriptor in (self._watched, self._held):
            if descriptor >= 0:
                os.close(descriptor)
        self._watched = self._held = -1


def failed_first(children: Sequence[Child]) -> Child | None:
    """The process whose failure is the cause of the others', or None where none has failed.

    That is one that a signal ended, else one that found a mistake of the user's, else the earliest: the others end with
    a failure because they are told of it.
    """
    failed = [child for child in children if child.failed]
    return min(failed, key=_precedence, default=None)


def _precedence(child: Child) -> tuple[bool, bool, float]:
    assert child.code is not None
    assert child.ended_s is not None
    return child.code >= 0, child.code != USER_ERROR, child.ended_s


def end_with_parent() -> None:
    """Have this process end when the process that started it has gone; to be called before anything else.

    It gets SIGTERM then, and is ended by force if it still runs after `ORPHAN_S`. Nothing happens in a process that
    was not started by `Children`.
    """
    descriptor = os.environ.pop(LIFELINE, None)
    if descriptor is not None:
        threading.Thread(target=_watch, args=(int(descriptor),), name="lifeline", daemon=True).start()


def _watch(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: this returns when the parent's end is closed
    log.warning("the process that started this one has ended")
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # to the main thread itself, which may be blocked in a call
    time.sleep(ORPHAN_S)
    os._exit(1)
