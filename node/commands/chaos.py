"""`isthmus chaos`: a local run, disturbed on purpose, and what it survived."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from pathlib import Path

from coordinator.layout import check_stages
from netem.errors import ConfigError, RunAborted
from node.commands.node import interrupt
from node.commands.run import check_corpus, check_network, prepared
from node.commands.written import write_text
from node.config import Config

log = logging.getLogger("isthmus.chaos")


@dataclass(frozen=True)
class Wish:
    """The options of the command line."""

    seed: int
    minutes: float
    gap_s: float
    kinds: tuple[str, ...]
    spared: int
    out: Path | None


def chaos(config: Config, wish: Wish) -> int:
    """Run, disturb, report; the exit code: 0 where the run went on to the end."""
    from node.lab.chaos.drive import drive
    from node.lab.chaos.schedule import KINDS, Kind, Plan, draw
    from node.lab.chaos.verdict import lines

    check_stages(config.coordinator.layout)
    if wish.minutes <= 0 or wish.gap_s <= 0:
        raise ConfigError("--minutes, --gap: expected more than 0")
    if unknown := [kind for kind in wish.kinds if kind not in KINDS]:
        raise ConfigError(f"--kind {unknown[0]}: expected one of {', '.join(KINDS)}")
    kinds = tuple(Kind(kind) for kind in wish.kinds) or KINDS
    duration_s = 60.0 * wish.minutes
    recovery_s = 2 * config.coordinator.heartbeat_timeout_s
    plan = Plan(wish.seed, duration_s, kinds, wish.gap_s, 0.5 * recovery_s, recovery_s, wish.spared)
    schedule = draw(plan, [f"node-{rank}" for rank in range(config.coordinator.nodes)])
    if not schedule:
        raise ConfigError(f"--minutes {wish.minutes:g}: too short for a disturbance; expected more, or a smaller --gap")
    check_network(config)
    check_corpus(config)
    signal.signal(signal.SIGTERM, interrupt)
    with prepared(config) as config:
        log.info("%d disturbances in %g minutes, seed %d", len(schedule), wish.minutes, wish.seed)
        outcome = drive(config, schedule, duration_s)
        text = "\n".join(lines(outcome, min(duration_s, outcome.lasted_s), recovery_s))
        print(text)
        write_text(wish.out or config.run.folder / "chaos.md", text + "\n", "--out")
    if outcome.ended:
        raise RunAborted(f"{outcome.ended}; logs are in {config.run.folder / 'logs'}")
    return 0
