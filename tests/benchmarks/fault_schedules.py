"""Seeded schedules of faults on real processes, one run of three nodes after another, and what each one survived.

    PYTHONPATH=tests:. python tests/benchmarks/fault_schedules.py RESULTS.jsonl [--most N] [--page docs/reliability.md]

Each schedule is one fault, or two together, at a named point of a run that is a few seconds long. What came of it is
one line of RESULTS.jsonl; schedules that are there already are not run again. With --page the table between the
markers of that page is written anew. The exit code is 1 where a schedule broke a promise.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec

from coordinator.records.folder import FAULTS, LOGS, METRICS
from coordinator.records.follow import Follower
from coordinator.records.rates import Record
from netem.children import Children
from netem.tables import markdown_table
from node.commands.run import check_corpus
from node.config import Config, load_config
from node.lab.chaos.drive import Chaos
from node.lab.chaos.schedule import COORDINATOR, Disturbance, Kind

SEED = 11
STEPS, WARM_UP, EVERY = 24, 4, 4
HEARTBEAT_TIMEOUT_S, STEP_TIMEOUT_S = 2.0, 3.0
START_S, LIMIT_S, FAREWELL_S, TICK_S = 60.0, 75.0, 10.0, 0.02
MOST_LOSS_ERROR = 5e-4
"""Relative; float32 sums in another order differ by less."""
BEGIN, END = "<!-- schedules: written by tests/benchmarks/fault_schedules.py -->\n", "<!-- end of schedules -->\n"
SETTINGS = [
    *("--coordinator.nodes=3", f"--train.steps={STEPS}", "--model.context=64", "--model.layers=2", "--run.threads=1"),
    *(f"--compress.warmup_steps={WARM_UP}", "--compress.calibration_batches=1", "--data.max_tokens=40000"),
    *("--compress.format=float32", "--compress.dense_format=float32", "--train.eval_batches=1"),
    *(f"--train.eval_every={2 * EVERY}", f"--train.checkpoint_every={2 * EVERY}", "--coordinator.return_timeout_s=30"),
    *(f"--coordinator.heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S}", "--coordinator.heartbeat_interval_s=0.4"),
    *(f"--coordinator.step_timeout_s={STEP_TIMEOUT_S}", "--coordinator.join_timeout_s=40"),
]
PHASES = {
    "before the first step": -1,
    "warm-up": 1,
    "basis is made": WARM_UP,
    "compressed": WARM_UP + 1,
    "averaging of weights": 3 * EVERY - 1,
    "checkpoint and evaluation": 2 * EVERY - 1,
    "last step": STEPS - 1,
}
"""Points of a run, by the step after whose record they are."""
LASTS_S = {Kind.KILL: (0.3, 0.5), Kind.STOP: (1.0, 6.0), Kind.HANG: (6.0, 8.0), Kind.LEADER: (0.3, 2.0)}
OTHER_LASTS_S = (1.0, 6.0)


class Schedule(NamedTuple):
    """What is done: kinds and victims at once at a phase, or the second where the first one's victim joins again."""

    number: int
    kinds: tuple[Kind, ...]
    victims: tuple[str, ...]
    phase: str
    lasts_s: float
    delay_s: float
    sync_every: int
    relay: str
    in_join: bool = False

    @property
    def name(self) -> str:
        return " and ".join(f"{kind} {victim}" for kind, victim in zip(self.kinds, self.victims, strict=True))


def schedules() -> list[Schedule]:
    """All of them; equal at each call."""
    source = random.Random(SEED)
    found: list[Schedule] = []
    nodes = ["node-0", "node-1", "node-2"]

    def add(kinds: Sequence[Kind], victims: Sequence[str], phase: str, in_join: bool = False) -> None:
        number = len(found)
        lasts_s = round(source.uniform(*LASTS_S.get(kinds[0], OTHER_LASTS_S)), 2)
        delay_s, relay = round(source.uniform(0.0, 0.2), 3), "always" if number % 3 == 2 else "never"
        sync_every = EVERY if number % 2 else 1
        found.append(
            Schedule(number, tuple(kinds), tuple(victims), phase, lasts_s, delay_s, sync_every, relay, in_join)
        )

    for kind in Kind:
        late = ["last step"] if kind in (Kind.KILL, Kind.LEADER) else []
        middle = [phase for phase in PHASES if phase not in ("last step", "before the first step")]
        early = ["before the first step"] if kind in (Kind.KILL, Kind.STOP, Kind.LEADER, Kind.CUT) else []
        for phase in [*early, *source.sample(middle, 4 - len(early) - len(late)), *late]:
            add([kind], [COORDINATOR if kind is Kind.LEADER else source.choice(nodes)], phase)
    add([Kind.KILL, Kind.KILL], ["node-0", "node-2"], "compressed")
    add([Kind.KILL, Kind.LEADER], ["node-1", COORDINATOR], "averaging of weights")
    add([Kind.KILL, Kind.KILL], ["node-2", "node-0"], "warm-up", in_join=True)
    add([Kind.KILL, Kind.LEADER], ["node-2", COORDINATOR], "warm-up", in_join=True)
    return found


def configured(schedule: Schedule | None, sync_every: int, outputs: Path) -> Config:
    """The run's settings."""
    relay = schedule.relay if schedule else "never"
    latency_ms = 20 if schedule and schedule.in_join else 1  # so that the run has not ended before the join
    own = [f"--net.latency={latency_ms} ms", f"--train.sync_every={sync_every}", f"--coordinator.relay={relay}"]
    own.append(f"--run.outputs={outputs}")
    config = load_config(Path("configs/tiny.toml"), [*SETTINGS, *own])
    name = f"{schedule.number if schedule else 'undisturbed'}-{sync_every}"
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, name=name))


class Play:
    """One run under one schedule."""

    def __init__(self, config: Config, schedule: Schedule | None, children: Children) -> None:
        self.records: list[Record] = []
        self.began_s = 0.0
        self._schedule = schedule
        self._folder = config.run.folder
        (self._folder / LOGS).mkdir(parents=True)
        self._chaos = Chaos(config, children)
        self._under_way: list[Disturbance] = []
        self._follower = Follower(self._folder / METRICS)

    def run(self) -> str:
        """To the end; how it ended."""
        self._chaos.start()
        waiting = self._disturbances()
        started_s = time.monotonic()
        due_s: float | None = None
        while not self._chaos.is_over():
            now_s = time.monotonic()
            if now_s - started_s > (LIMIT_S if self.records else START_S):
                return f"did not end within {LIMIT_S:g} s"
            self.records += self._follower.read()
            if waiting and due_s is None and self._is_reached(waiting[0]):
                due_s = now_s + (self._schedule.delay_s if self._schedule else 0.0)
            while waiting and due_s is not None and now_s >= due_s:
                self._begin(waiting.pop(0), now_s)
                due_s = None if self._schedule and self._schedule.in_join else due_s
            for one in [one for one in self._under_way if now_s >= one.until_s]:
                self._chaos.end(one)
                self._under_way.remove(one)
            self._chaos.tick(now_s)
            time.sleep(TICK_S)
        for one in self._under_way:
            self._chaos.end(one)
        time.sleep(0.2)
        self.records += self._follower.read()
        return "ran to its end"

    def _disturbances(self) -> list[tuple[Kind, str]]:
        return list(zip(self._schedule.kinds, self._schedule.victims, strict=True)) if self._schedule else []

    def _begin(self, what: tuple[Kind, str], now_s: float) -> None:
        assert self._schedule is not None
        kind, victim = what
        one = Disturbance(now_s, self._schedule.lasts_s, kind, victim)
        self.began_s = time.time()
        self._chaos.begin(one)
        self._under_way.append(one)

    def _is_reached(self, what: tuple[Kind, str]) -> bool:
        assert self._schedule is not None
        if self._schedule.in_join and what[1] != self._schedule.victims[0]:
            log = self._folder / LOGS / f"{self._schedule.victims[0]}.log"
            return "getting the weights" in log.read_text(errors="replace")
        after = PHASES[self._schedule.phase]
        if after < 0:
            return "2 of 3 nodes are here" in (self._folder / LOGS / f"{COORDINATOR}.log").read_text()
        return bool(self.records) and int(self.records[-1]["step"]) >= after


def play(schedule: Schedule | None, sync_every: int, outputs: Path) -> dict[str, Any]:
    """Run one schedule; what came of it."""
    config = configured(schedule, sync_every, outputs)
    began_s = time.monotonic()
    with Children() as children:
        one = Play(config, schedule, children)
        ended = one.run()
    took_s = time.monotonic() - began_s
    faults_path = config.run.folder / FAULTS
    faults = [json.loads(line) for line in faults_path.read_text().splitlines()] if faults_path.exists() else []
    logs = {path.stem: path.read_text(errors="replace") for path in (config.run.folder / LOGS).iterdir()}
    steps = [int(record["step"]) for record in one.records]
    times_s = [float(record["time"]) for record in one.records]
    after_s = [at_s for at_s in times_s if at_s >= one.began_s]
    waits_s = [later - earlier for earlier, later in pairwise([one.began_s, *after_s])]
    return {
        "number": schedule.number if schedule else None,
        "sync_every": sync_every,
        "ended": ended,
        "reason": _last_line(logs.get(COORDINATOR, "")),
        "took_s": round(took_s, 1),
        "stood_s": round(max(waits_s), 2) if waits_s and schedule else 0.0,
        "step_s": round(median(later - earlier for earlier, later in pairwise(times_s)), 3) if steps[1:] else 0.0,
        "steps": steps,
        "losses": {step: record["loss"] for step, record in zip(steps, one.records, strict=True)},
        "heldout": [record["heldout_loss"] for record in one.records if "heldout_loss" in record][-1:],
        "faults": [(fault["kind"], fault["nodes"], fault["lost_steps"], fault["cost_s"]) for fault in faults],
        "tracebacks": sorted(name for name, text in logs.items() if "Traceback" in text),
    }


def broken(result: dict[str, Any], schedule: Schedule, undisturbed: dict[str, Any]) -> list[str]:
    """The promises of docs/reliability.md that this run did not keep."""
    found = [f"Traceback in the log of {name}" for name in result["tracebacks"]]
    if result["ended"] != "ran to its end" or not result["steps"] or result["steps"][-1] != STEPS:
        found.append(f"{result['ended']}, at step {result['steps'][-1:]}: {result['reason']}")
    missing = set(range(1, STEPS + 1)) - set(result["steps"])
    if len(set(result["steps"])) < len(result["steps"]):
        found.append("a step counts twice")
    if len(missing) > schedule.kinds.count(Kind.LEADER):
        found.append(f"no record of steps {sorted(missing)}")
    if schedule.sync_every == 1 and loss_error(result, undisturbed) > MOST_LOSS_ERROR:
        found.append(f"losses differ by {loss_error(result, undisturbed):.1e}")
    return found


def loss_error(result: dict[str, Any], undisturbed: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss from that of the undisturbed run."""
    whole, own = undisturbed["losses"], result["losses"]
    return max((abs(own[step] / whole[step] - 1) for step in own if step in whole), default=0.0)


def row(result: dict[str, Any], schedule: Schedule, undisturbed: dict[str, Any]) -> list[str]:
    """One line of the table."""
    told = ", ".join(f"{kind} {'+'.join(nodes)}" for kind, nodes, _, _ in result["faults"]) or "nothing told"
    lost_steps = sum(lost for _, _, lost, _ in result["faults"])
    final = result["heldout"][-1] / undisturbed["heldout"][-1] - 1 if result["heldout"] else float("nan")
    bad = broken(result, schedule, undisturbed)
    return [
        schedule.name + (", as it joins again" if schedule.in_join else ""),
        f"{schedule.lasts_s:.1f} s",
        schedule.phase,
        f"c = {schedule.sync_every}" + (", relay" if schedule.relay == "always" else ""),
        "; ".join(bad) if bad else f"goes on ({told})",
        f"{result['stood_s']:.1f}",
        str(lost_steps),
        f"{final:+.1e}",
    ]


HEAD = [
    "what, to whom",
    "lasts",
    "when",
    "run",
    "outcome (events told)",
    "stood still, s",
    "steps lost",
    "held-out loss",
]


def table(results: dict[str, dict[str, Any]]) -> str:
    """All results as Markdown, and a line that sums them up."""
    rows, bad = [], 0
    for schedule in schedules():
        if (result := results.get(str(schedule.number))) is not None:
            whole = results[f"undisturbed-{schedule.sync_every}"]
            rows.append(row(result, schedule, whole))
            bad += bool(broken(result, schedule, whole))
    steps_s = ", ".join(f"{results[f'undisturbed-{every}']['step_s']:.2f} s (c = {every})" for every in (1, EVERY))
    told = f"{len(rows)} schedules, of which {bad} broke a promise. An undisturbed step takes {steps_s}."
    return f"{told}\n\n{markdown_table(HEAD, rows, align='lrlllrrr')}\n"


def write_page(page: Path, text: str) -> None:
    """Put the table between the page's markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}{text}{END}{rest.split(END)[1]}", encoding="utf-8")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][-300:]


def main() -> int:
    """Run what is missing, up to --most, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--most", type=int, default=1000, help="run no more than so many now (default: all)")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    logging.getLogger("isthmus").setLevel(logging.ERROR)
    results: dict[str, dict[str, Any]] = {}
    if options.results.exists():
        for line in options.results.read_text().splitlines():
            results |= json.loads(line)
    check_corpus(configured(None, 1, Path("outputs")))
    wanted = [("undisturbed-1", None, 1), (f"undisturbed-{EVERY}", None, EVERY)]
    for name, schedule, every in [*wanted, *((str(one.number), one, one.sync_every) for one in schedules())]:
        if name in results or options.most <= 0:
            continue
        options.most -= 1
        with tempfile.TemporaryDirectory() as folder:
            result = json.loads(json.dumps(play(schedule, every, Path(folder))))
        results[name] = result
        with options.results.open("a") as lines:
            lines.write(json.dumps({name: result}) + "\n")
        if schedule is not None:
            print(f"{result['took_s']:5.1f} s | {' | '.join(row(result, schedule, results[f'undisturbed-{every}']))}")
            sys.stdout.flush()
    if options.page:
        write_page(options.page, table(results))
    return any(
        broken(results[str(one.number)], one, results[f"undisturbed-{one.sync_every}"])
        for one in schedules()
        if str(one.number) in results
    )


if __name__ == "__main__":
    sys.exit(main())
