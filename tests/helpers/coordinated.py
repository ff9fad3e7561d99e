"""A coordinator's part of a training run, played within one process: barrier, schedule, ballots, nothing else.

For the trainer's tests: ranks are the threads of `threads`, and what they say to the coordinator is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coordinator.assignment import Assignment
from coordinator.messages import Go, Stop
from helpers.small import VOCAB
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import exchange_of
from node.config import Config
from node.data import Corpus, make_tokenizer
from node.lab.in_process import go
from node.model.exchanged import ExchangedLlama
from node.train.averaging import Averager
from node.train.checkpoint import Checkpoints
from node.train.trainer import Metrics, Trainer

TIMEOUT_S = 30.0


def corpus(tokens: int = 4000) -> Corpus:
    """Tokens that can be learned: each follows from the one before it, most of the time."""
    draw = np.random.default_rng(5)
    ids = np.zeros(tokens, np.uint16)
    for place in range(1, tokens):
        ids[place] = (3 * ids[place - 1] + 1) % VOCAB if draw.random() < 0.9 else draw.integers(VOCAB)
    held = tokens // 10
    return Corpus(train=ids[held:], heldout=ids[:held], tokenizer=make_tokenizer("bytes"), fingerprint="")


@dataclass
class Coordinator:
    """What all ranks' sessions share."""

    config: Config
    world: Sequence[Sequence[int]]
    until: int
    said: list[dict[int, tuple[Metrics | None, dict[str, str]]]] = field(default_factory=list)  # by rank, by step
    saved: list[list[int]] = field(default_factory=list)  # by rank

    def __post_init__(self) -> None:
        self.said = [{} for _ in self.world]
        self.saved = [[] for _ in self.world]
        self.votes: list[dict[int, str]] = [{} for _ in self.world]
        self.together = threading.Barrier(len(self.world), timeout=TIMEOUT_S)

    def losses(self) -> list[float]:
        """Loss per token of every step, over all ranks."""
        reports = [[by_step[step][0] for by_step in self.said] for step in sorted(self.said[0])]
        whole = [[part for part in parts if part is not None] for parts in reports]
        return [sum(p["loss_sum"] for p in parts) / sum(p["tokens"] for p in parts) for parts in whole if parts]


@dataclass
class Session:
    """One rank's word with the coordinator: the trainer's `Barrier`, and the averager's `Ballot`."""

    shared: Coordinator
    rank: int

    def ready(self, step: int, metrics: Metrics | None = None, digests: dict[str, str] | None = None) -> Go | Stop:
        said = self.shared.said
        said[self.rank][step] = (metrics, digests or {})
        self.shared.together.wait()
        assert all(by_step[step][1] == said[0][step][1] for by_step in said), "digests differ"
        if step == self.shared.until:
            return Stop(ok=True)
        return go(self.shared.config, Assignment(self.shared.world), step)

    def saved(self, step: int) -> None:
        self.shared.saved[self.rank].append(step)

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        votes = self.shared.votes
        votes[self.rank][round_id] = digest
        self.shared.together.wait()
        assert ok
        assert all(of_rank[round_id] == digest for of_rank in votes), "results differ"


class Still:
    """A meter with nothing to say."""

    def step_metrics(self) -> Metrics:
        return {"sent_wire_bytes": 0.0}

    def evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_trainer(
    config: Config, world: Sequence[Sequence[int]], rank: int, wire: ThreadWire, session: Session, folder: Path
) -> Trainer:
    """One rank's trainer, with the weights that `run.seed` gives all ranks."""
    exchange = exchange_of(config, world, rank, wire)
    averager = Averager(rank, len(world), wire, session)
    return Trainer(
        config,
        corpus(),
        ExchangedLlama(config, VOCAB, exchange.payload.ranks),
        exchange,
        averager,
        Checkpoints(folder, rank),
    )


def train(
    config: Config, world: Sequence[Sequence[int]], folder: Path, *, start: int = 0, until: int | None = None
) -> tuple[Coordinator, list[Trainer]]:
    """A run from `start` steps done (resumed, if not 0) until `until` are; the trainers by rank."""
    shared = Coordinator(config, world, config.train.steps if until is None else until)

    def work(rank: int, wire: ThreadWire) -> Trainer:
        session = Session(shared, rank)
        trainer = make_trainer(config, world, rank, wire, session, folder)
        if start:
            trainer.resume(start)
        trainer.run(start, session, Still())
        return trainer

    return shared, run_ranks(len(world), work)
