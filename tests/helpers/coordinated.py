"""A coordinator's part of a training run within one process, for the trainer's tests: barrier, schedule, votes.

Ranks are the threads of `threads`, and what they say to the coordinator is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coordinator.assignment import Assignment
from coordinator.messages import Go, Stop
from helpers.small import VOCAB
from helpers.threads import ThreadWire, run_ranks
from node.config import Config
from node.data import Corpus, make_tokenizer
from node.data.ids import TokenArray
from node.exchange.inbox import Members
from node.exchange.payload import PayloadFormat
from node.lab.in_process import go
from node.train.attempt import Metrics
from node.train.from_config import drawn_model, payload_format
from node.train.trainer import Trainer
from node.train.world import World, build_world

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class EndingTokenizer:
    """End-of-text is an id that a small model embeds."""

    name = "small"
    vocab_size = VOCAB
    eot = VOCAB - 1

    def encode_document(self, text: str) -> TokenArray:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError


def documents(tokens: int = 4000) -> Corpus:
    """The tokens of `corpus` in documents of some ten tokens, which its contexts tell apart."""
    joined, draw = corpus(tokens), np.random.default_rng(6)
    parts = [np.where(draw.random(len(ids)) < 0.1, VOCAB - 1, ids) for ids in (joined.train, joined.heldout)]
    return Corpus(*parts, tokenizer=EndingTokenizer(), fingerprint="", marks_documents=True)


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
    """What the sessions of all ranks share. It ends the run after `until` steps."""

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
    """One rank's session with the coordinator: the trainer's `StepSession`, the averager's `VotingSession`."""

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

    def saved(self, step: int, reason: str = "", generation: int | None = None) -> None:
        assert not reason
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

    def begin(self, step: int) -> None:
        """Nothing is measured."""


def make_trainer(config: Config, payload: PayloadFormat) -> Trainer:
    """A node's trainer, with the weights that `run.seed` gives all nodes, and the ranks of the node's `payload`."""
    task = documents() if config.data.document_masking else corpus()
    return Trainer(config, task, drawn_model(config, VOCAB, payload.ranks))


def make_world(
    payload: PayloadFormat, chunks: Sequence[Sequence[int]], wire: ThreadWire | None, session: Session, folder: Path
) -> World:
    """The world of one rank, over memory. Rank r owns the chunks `chunks[r]`; a world of one has no wire."""
    names = tuple(f"node-{rank}" for rank in range(len(chunks)))
    members = Members(1, Assignment(chunks), session.rank, names)
    return build_world(members, payload, wire if len(chunks) > 1 else None, session, folder)


def train(
    config: Config, world: Sequence[Sequence[int]], folder: Path, *, start: int = 0, until: int | None = None
) -> tuple[Coordinator, list[Trainer]]:
    """A run from `start` steps done (resumed, if not 0) until `until` are; the trainers by rank.

    They are as after the next generation's roster, which begins there: the last step is taken.
    """
    shared = Coordinator(config, world, config.train.steps if until is None else until)

    def work(rank: int, wire: ThreadWire) -> Trainer:
        session = Session(shared, rank)
        payload = payload_format(config)
        here, trainer = make_world(payload, world, wire, session, folder), make_trainer(config, payload)
        if start:
            trainer.resume(here, start)
        trainer.run(here, session, Still())
        trainer.settle(shared.until)
        trainer.close(TIMEOUT_S)
        return trainer

    return shared, run_ranks(len(world), work)
