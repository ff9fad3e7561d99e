"""Several nodes in one process, without sockets: ranks are threads, and what one sends the other finds in memory.

The arithmetic is that of a real run: the same exchange, the same averaging ring, tensors handed over as copies. There
is no network, and so no time and no loss. `node.exchange.wire` and `coordinator.client` are the real ones.
`train_in_process` is a whole run of this kind.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coordinator.assignment import Assignment
from coordinator.messages import Go, Round, Stop
from netem.errors import ConfigError, RunAborted
from node.config import Config
from node.data import Task
from node.exchange.formats import TensorSpec
from node.exchange.inbox import Members
from node.exchange.passes import PassKey
from node.exchange.payload import PayloadFormat
from node.model.exchanged import ExchangedLlama
from node.train.attempt import Metrics
from node.train.from_config import first_model
from node.train.schedule import StepSchedule
from node.train.trainer import Trainer
from node.train.world import World, build_world

TIMEOUT_S = 600.0

Tensors = tuple[Tensor, ...]
Watcher = Callable[[int, list[Metrics]], None]
"""Called with the steps done and every rank's metrics, while all ranks wait."""
ModelWatcher = Callable[[ExchangedLlama, int, list[Metrics]], None]
"""The same with rank 0's model, which may be looked at then."""

Preparation = Callable[[ExchangedLlama], None]
"""Gives a model the weights from which its run starts, where those are not what the config gives."""


class Post:
    """The memory that the wires of all ranks share: tensors by address. A wait gives up after `timeout_s`."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._held: dict[Hashable, Tensors] = {}
        self._closed = False

    def put(self, key: Hashable, tensors: Tensors) -> None:
        with self._changed:
            assert key not in self._held, f"{key} was sent twice"
            self._held[key] = tuple(tensor.detach().clone() for tensor in tensors)
            self._changed.notify_all()

    def first(self, keys: dict[int, Hashable]) -> int:
        """Wait until any of `keys` is here; its number."""
        with self._changed:
            self._await(lambda: any(key in self._held for key in keys.values()))
            return next(number for number, key in keys.items() if key in self._held)

    def take(self, key: Hashable) -> Tensors:
        with self._changed:
            self._await(lambda: key in self._held)
            return self._held.pop(key)

    def close(self) -> None:
        """A rank has failed: end every wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _await(self, ready: Callable[[], bool]) -> None:
        arrived = self._changed.wait_for(lambda: self._closed or ready(), self._timeout_s)
        if self._closed:
            raise RunAborted("another rank failed")
        if not arrived:
            raise RunAborted(f"a rank sent nothing for {self._timeout_s:g} s")


class MemoryWire:
    """One rank's end: the interfaces of `node.exchange.chunks.ChunkWire` and of the averaging ring."""

    def __init__(self, post: Post, rank: int) -> None:
        self._post, self._rank = post, rank

    def begin(self, number: int) -> None:
        """Nothing to prepare: memory takes all that is sent."""

    def end(self, number: int) -> None:
        """Nothing is left of a pass: all that is sent is taken."""

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: Tensors) -> None:
        self._post.put((rank, self._rank, kind, key.number, layer, chunk), tensors)

    def publish(self, ranks: tuple[int, ...], layer: int, chunk: int, key: PassKey, tensors: Tensors) -> None:
        for rank in ranks:
            self.send(rank, "kv", layer, chunk, key, tensors)

    def first_of(self, kind: str, layer: int, chunks: dict[int, int], number: int) -> int:
        keys: dict[int, Hashable] = {
            chunk: (self._rank, owner, kind, number, layer, chunk) for chunk, owner in sorted(chunks.items())
        }
        return self._post.first(keys)

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> Tensors:
        return self._post.take((self._rank, rank, kind, number, layer, chunk))

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None:
        self._post.put((rank, "ring", round_id, hop, bucket), (shard,))

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor:
        (shard,) = self._post.take((self._rank, "ring", round_id, hop, bucket))
        return shard


_ROUNDS, _BEGUN = 16, 8
"""Numbers of rounds for one step, and the first of them that is for rounds which begin to travel with it."""


def go(config: Config, assignment: Assignment, done: int, cursor: int = 0) -> Go:
    """The step after `done` steps, as a coordinator would begin it, in a run whose contexts begin at `cursor`."""
    schedule, step, weights = StepSchedule(config.model, config.compress, config.train), done + 1, assignment.weights()

    def numbered(kinds: list[str], first: int) -> list[Round]:
        return [Round(round_id=first + place, kind=kind, weights=weights) for place, kind in enumerate(kinds)]

    # A round that travels has the number that the step gave it in which it began.
    ends = numbered(schedule.ends(step), _ROUNDS * (step - config.train.sync_delay) + _BEGUN)
    return Go(
        step=done,
        generation=1,
        cursor=cursor + done * config.train.batch,
        rounds=numbered(schedule.rounds(step), _ROUNDS * done) + ends,
        begins=numbered(schedule.begins(step), _ROUNDS * done + _BEGUN),
    )


@dataclass
class Coordinator:
    """Answers as a coordinator would, from the same schedule: every round happens, and no node is ever lost."""

    config: Config
    assignment: Assignment
    watch: Watcher
    cursor: int = 0
    """Number of the run's first context."""
    _metrics: list[Metrics | None] = field(init=False)
    _digests: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = self.assignment.n_ranks
        self._metrics, self._digests = [None] * ranks, [{} for _ in range(ranks)]
        self._together = threading.Barrier(ranks, timeout=TIMEOUT_S)

    def ready(self, rank: int, step: int, metrics: Metrics | None, digests: dict[str, str]) -> Go | Stop:
        """Wait until all ranks have done `step` steps; the next step, or the end."""
        self._metrics[rank], self._digests[rank] = metrics, digests
        if self._meet() == 0:
            if any(said != self._digests[0] for said in self._digests):
                raise RunAborted(f"after step {step} the ranks differ in what they should share")
            self.watch(step, [part for part in self._metrics if part is not None])
        self._meet()
        return Stop(ok=True) if step == self.config.train.steps else go(self.config, self.assignment, step, self.cursor)

    def abort(self) -> None:
        self._together.abort()

    def _meet(self) -> int:
        try:
            return self._together.wait()
        except threading.BrokenBarrierError:
            raise RunAborted("another rank failed") from None


@dataclass
class Session:
    """One rank's session: the trainer's `StepSession`, the averager's `VotingSession`, and a meter of nothing."""

    coordinator: Coordinator
    rank: int

    def ready(self, step: int, metrics: Metrics | None = None, digests: dict[str, str] | None = None) -> Go | Stop:
        return self.coordinator.ready(self.rank, step, metrics, digests or {})

    def saved(self, step: int, reason: str = "", generation: int | None = None) -> None:
        """Nothing follows from it: a study keeps no checkpoints."""

    def vote(self, round_id: int, ok: bool, digest: str, reason: str = "") -> None:
        """In one process every rank computes the same bits, or the next barrier's digests differ."""

    def step_metrics(self) -> Metrics:
        return {}

    def begin(self, step: int) -> None:
        """Nothing is measured."""


def train_in_process(
    config: Config,
    task: Task,
    payloads: Sequence[PayloadFormat],
    watch: ModelWatcher,
    prepare: Preparation | None = None,
    cursor: int = 0,
) -> list[Trainer]:
    """Train on every rank to the end, each in a thread, with one of `payloads` for each; the trainers by rank.

    `prepare` is called with each rank's model before the first step, and `cursor` is the number of the first context.
    Checkpoints are not kept. Raises what the first rank to fail raised.
    """
    if config.coordinator.layout.columns > 1:
        owners = config.coordinator
        raise ConfigError(
            f"coordinator.shards = {owners.shards}, coordinator.stages = {owners.stages}: expected 1, since all nodes "
            "are threads of one process here; use isthmus run"
        )
    ranks, post = len(payloads), Post()
    models = [first_model(config, task.vocab_size, payload.ranks) for payload in payloads]
    for model in models:
        if prepare is not None:
            prepare(model)
    trainers = [Trainer(config, task, model) for model in models]
    coordinator = Coordinator(
        config, config.assignment(), lambda step, metrics: watch(models[0], step, metrics), cursor
    )
    sessions = [Session(coordinator, rank) for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:

        def work(rank: int) -> None:
            try:
                wire = MemoryWire(post, rank) if ranks > 1 else None
                world = _world(config, sessions[rank], payloads[rank], wire, Path(folder))
                trainers[rank].run(world, sessions[rank], sessions[rank])
            except BaseException:
                coordinator.abort()
                post.close()
                raise

        errors = [future.exception() for future in [pool.submit(work, rank) for rank in range(ranks)]]
    # A rank that ended because another failed says nothing of the cause, so it is reported last.
    raised = sorted((error for error in errors if error), key=lambda error: isinstance(error, RunAborted))
    if raised:
        raise raised[0]
    return trainers


def _world(config: Config, session: Session, payload: PayloadFormat, wire: MemoryWire | None, folder: Path) -> World:
    assignment, rank = config.assignment(), session.rank
    members = Members(1, assignment, rank, tuple(f"node-{peer}" for peer in range(assignment.n_ranks)))
    return build_world(members, payload, wire, session, folder)
