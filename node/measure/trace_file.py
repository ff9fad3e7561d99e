"""The traces of single steps on disk: <run>/trace/node-R.jsonl, one line for each recorded step of rank R.

A line has the step's spans and messages (`node.measure.spans`), in seconds of the node's own monotonic clock, and the
name of that clock: nodes on one host share it. `node.watch.trace` joins the files of all nodes.
"""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from netem.errors import ConfigError
from netem.names import plain
from node.exchange.inbox import Members
from node.measure.spans import KINDS, Sent, Span, StepTime, Taken

TRACE = "trace"
"""The folder of traces in a run's folder."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")

_Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
_Step = Annotated[int, Meta(ge=1)]


class StepLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One recorded step of one node."""

    step: _Step
    generation: int
    rank: _Rank
    name: Annotated[str, Meta(max_length=128)]
    clock: Annotated[str, Meta(max_length=256)]
    """Nodes whose clocks have the same name share one: their times compare."""
    began_s: float
    ended_s: float
    accounts_s: dict[str, float]
    spans: list[Span]
    sent: list[Sent]
    taken: list[Taken]


def append_step(run_folder: Path, members: Members, step: int, time: StepTime) -> None:
    """Write the record of one step to this node's file. Raises `OSError` where the disk does."""
    record = time.record
    assert record is not None
    line = StepLine(
        step=step,
        generation=members.generation,
        rank=members.rank,
        name=plain(members.peers[members.rank]),
        clock=_clock_name(),
        began_s=time.began_s,
        ended_s=time.ended_s,
        accounts_s=time.accounts_s,
        spans=record.spans,
        sent=record.sent,
        taken=record.taken,
    )
    path = run_folder / TRACE / f"node-{members.rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def read_steps(run_folder: Path) -> dict[int, list[StepLine]]:
    """All recorded steps of a run, each with a line for every node, by rank. Where a step was done again in a later
    generation, the lines of that one count.

    Raises `ConfigError` where there are no traces, or a file holds something else.
    """
    paths = sorted((run_folder / TRACE).glob("node-*.jsonl"))
    if not paths:
        raise ConfigError(
            f"{run_folder / TRACE}: no traces of a node; a run writes them with --run.trace STEPS, such as "
            "--run.trace 40..42"
        )
    newest: dict[tuple[int, int], StepLine] = {}
    for path in paths:
        for number, text in enumerate(_lines(path), start=1):
            line = _line(text, f"{path}, line {number}")
            newest[line.step, line.rank] = line
    steps: dict[int, list[StepLine]] = {}
    for (step, _), line in sorted(newest.items(), key=lambda item: item[0]):
        steps.setdefault(step, []).append(line)
    latest = {step: max(line.generation for line in lines) for step, lines in steps.items()}
    return {step: [line for line in lines if line.generation == latest[step]] for step, lines in steps.items()}


def _lines(path: Path) -> list[bytes]:
    """Whole lines only: the last one may just be being written."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _line(text: bytes, where: str) -> StepLine:
    mend = "delete the file, and record the step again"
    try:
        line = msgspec.json.decode(text, type=StepLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not the record of a step ({error}); {mend}") from None
    if unknown := {span.kind for span in line.spans} - KINDS.keys():
        raise ConfigError(f"{where}: spans of an unknown kind {min(unknown)!r}; {mend}")
    if any(span.ended_s < span.began_s for span in line.spans) or line.ended_s < line.began_s:
        raise ConfigError(f"{where}: a span ends before it begins; {mend}")
    return line


@cache
def _clock_name() -> str:
    """The boot of the kernel whose monotonic clock this is: containers on one host share it too."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
