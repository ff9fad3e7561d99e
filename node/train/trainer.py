"""A training run as one node sees it: one step straight down the page.

The coordinator says which step begins, on which contexts, and which averaging rounds belong to it. The exchange moves
payloads in the forward and backward pass. The gradients are held until all nodes have theirs, which the next `Go` or a
round of the step says (`node.train.attempt`). What was measured goes to the coordinator with the next barrier. A
trainer lives as long as its node, and keeps nothing of the membership: each generation's world is given to it.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from coordinator.messages import Go, Round, Stop
from coordinator.plan import TAKE
from node.config import Config
from node.config.seeds import derive
from node.data import Task
from node.data.task import Sampler, count_asked
from node.measure.spans import BACKWARD, EVALUATE, FORWARD, GO, OPTIMIZER, SAVE
from node.model.exchanged import ExchangedLlama
from node.site.sharding import forget_pass, own_gradients, own_parameters, sum_replicated
from node.site.site import ALONE, Site
from node.subspace.basis import MomentProbe, Moments, digest
from node.subspace.energy import EnergyReport
from node.train import basis
from node.train.agreed import AgreedWeights
from node.train.attempt import Attempt, Metrics
from node.train.averaging import flatten, unflatten_into
from node.train.checkpoint import join_state, shared_state
from node.train.evaluate import heldout_loss
from node.train.finite import StepGuard, poison, require_finite
from node.train.optimizer import clip_gradients, make_optimizer
from node.train.passes import loss_sum
from node.train.pieces import Packed, pack
from node.train.schedule import (
    BASIS,
    FINITE,
    GRADIENTS,
    MOMENTS,
    RANKS,
    StepSchedule,
)
from node.train.world import World
from node.train.writer import LIMIT_S, Writer


class StepSession(Protocol):
    """The part of a session with the coordinator that begins steps (`coordinator.client.Session`)."""

    def ready(self, step: int, metrics: Metrics | None = None, digests: dict[str, str] | None = None) -> Go | Stop: ...

    def saved(self, step: int, reason: str = "", generation: int | None = None) -> None: ...


class Meter(Protocol):
    """Measures time, traffic, CPU and memory of this node (`node.worker.meter`)."""

    def begin(self, step: int) -> None:
        """Step `step` begins now, with the wait for its Go."""

    def step_metrics(self) -> Metrics:
        """What was measured in the step that ends now; the next one begins."""


class Trainer:
    """One node's training, through all generations. `done` is the number of steps that its weights have taken; one more
    may be under way, or be held. Where the node is a site of several processes, each has a trainer, with the model's
    shard; they do everything together."""

    def __init__(self, config: Config, task: Task, model: ExchangedLlama, site: Site = ALONE) -> None:
        self.model = model
        self._site = site
        self.optimizer = make_optimizer(model, config.train)
        self.done = 0
        self._config = config
        self._task = task
        self._schedule = StepSchedule(config.model, config.compress, config.train)
        self._agreed = AgreedWeights(config.train, self._schedule, model)
        self._guard = StepGuard(config.train)
        self._running = basis.RunningMoments(config.compress.refresh_decay)
        self._writer = Writer()
        self._keep_from = 0  # checkpoints before this step may be removed
        self._attempt: Attempt | None = None
        self._taken: Metrics = {}  # of the last step that was taken
        self._digests: dict[str, str] = {}  # must be equal on all nodes, which the next barrier compares

    def resume(self, world: World, step: int) -> None:
        """Load this run's checkpoint after `step` steps."""
        self._running.total = world.checkpoints.load(step, self.model, self.optimizer, self._agreed)
        self.done = step

    def share(self) -> Packed:
        """What a node that joins gets of this one. Nothing of it may change meanwhile: this node waits at a barrier."""
        return pack(shared_state(self.model, self.optimizer, self._running.total, self._agreed), self.done)

    def join(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take what another node shares, after `step` steps. Raises `ConfigError` where it is not of this model."""
        self._running.total = join_state(tensors, self.model, self.optimizer, self._agreed)
        self.done = step

    def settle(self, steps: int) -> None:
        """All nodes have taken `steps` steps: take the step that is held, or drop the one that is under way."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if attempt.held and attempt.number == steps:
            attempt.take(self.optimizer)
            self.done, self._taken = steps, attempt.metrics
        else:
            attempt.drop()
            forget_pass(self.model)

    def run(self, world: World, session: StepSession, meter: Meter) -> None:
        """Train in `world`, from `done` on, until the coordinator ends the run.

        Raises `GenerationOver` once the coordinator has begun a later generation, and `RunAborted` where the run ends
        before its last step. A step may be held then, or be under way: `settle` it.
        """
        assert self._attempt is None
        metrics = None
        self._agreed.drop()
        self._digests = self._common_digests(world)
        meter.begin(self.done + 1)
        while isinstance(go := self._next(world, session, metrics), Go):
            self._digests = {}
            self._keep_from = go.keep_from
            metrics = self.step(world, go)
            if self._attempt is None:
                metrics |= self._finish(world, session)
            metrics |= meter.step_metrics()

    def close(self, limit_s: float) -> None:
        """Wait until no checkpoint is being written, at most so long."""
        self._writer.wait(limit_s)

    def _next(self, world: World, session: StepSession, metrics: Metrics | None) -> Go | Stop:
        with world.spans.span(GO), self._site.together():
            reached = self._attempt.number if self._attempt else self.done
            return session.ready(reached, metrics, self._digests)

    def _finish(self, world: World, session: StepSession) -> Metrics:
        """What follows a step that has been taken: a checkpoint and an evaluation, where they are due."""
        if self._schedule.saves(self.done):
            with world.spans.span(SAVE):
                self._save(world, session)
        if self._schedule.evaluates(self.done):
            with world.spans.span(EVALUATE):
                return self.evaluate(world, self.done)
        return {}

    def _save(self, world: World, session: StepSession) -> None:
        """Copy this node's part of a checkpoint, to be written while training goes on. The last is waited for."""
        args = (self.done, self.model, self.optimizer, self._running.total, self._agreed, self._keep_from)
        said = partial(session.saved, generation=world.members.generation)
        self._writer.write(world.checkpoints.snapshot(*args), said)
        if self.done == self._config.train.steps:  # over narrow lines, the last one may take as long as a step may
            self._writer.wait(max(LIMIT_S, self._config.coordinator.step_timeout_s))
        if "weights" not in self._digests:  # an averaging of weights has just taken it
            self._digests["weights"] = digest([self._common_weights()])

    def step(self, world: World, go: Go) -> Metrics:
        """The step after `go.step` steps, with the averaging rounds that the coordinator has named. It is held in the
        end, or taken, where a round says so.

        With `go.tail` that many steps are taken already, and only what follows the last of them is done (again).
        """
        rounds = {entry.kind: entry for entry in go.rounds}
        with world.spans.span(OPTIMIZER):
            self.settle(go.step)
        if not go.tail:
            attempt = self._attempt = Attempt(go.step + 1, self._running, self._guard)
            self._compute(world, go, rounds, attempt)
            if TAKE not in rounds:
                return dict(attempt.metrics)
            world.averager.agree(rounds[TAKE].round_id)
            with world.spans.span(OPTIMIZER):
                self.settle(attempt.number)
        for entry in go.rounds:
            if self._agreed.averages(entry.kind):
                self._digests["weights"] = self._agreed.average(world.averager, entry, self.done)
        return dict(self._taken)

    def _compute(self, world: World, go: Go, rounds: dict[str, Round], attempt: Attempt) -> None:
        """Forward, backward, and the gradients' average where it is due."""
        number = attempt.number
        spec = self._schedule.pass_spec(number)
        sampler = self._sampler(spec.tokens)
        metrics: Metrics = {}
        if BASIS in rounds:
            self._keep_basis(attempt)
            metrics |= self._take_basis(world, rounds, go.cursor, number)
        for entry in go.begins:
            self._agreed.begin(world.averager, entry, number)

        batch = sampler.contexts(go.cursor)
        contexts, draw = self._site.part(batch), (number, -self._site.rank) if self._site.rank else (number,)
        probe = MomentProbe(self.model.ranks.groups) if self._schedule.samples_moments(number) else None
        with world.spans.span(FORWARD):
            loss = loss_sum(self.model, world.exchange, contexts, spec, probe, draw=draw)
        self._site.check()
        self._guard.check_loss(number, loss.detach())
        self.optimizer.zero_grad()
        with world.spans.span(BACKWARD):
            (loss / count_asked(batch)).backward()
            sum_replicated(self.model, self._site)
        self._site.check()

        norm, takes = self._settle_gradients(world, number, loss.detach(), rounds)
        lr = self._schedule.learning_rate(number)
        tokens = count_asked(contexts) * world.share
        metrics |= {"loss_sum": loss.item(), "tokens": tokens, "grad_norm": float(norm), "lr": lr}
        if not takes:
            metrics["skipped"] = 1.0
        if self._config.leaks and spec.compressed:
            metrics["leaks"] = 1.0
        attempt.hold(takes, lr, probe.moments if probe is not None else {}, metrics)

    def evaluate(self, world: World, number: int) -> Metrics:
        """The held-out loss after step `number`, and how much of K and V the subspaces kept."""
        train, report, spec = self._config.train, EnergyReport(), self._schedule.pass_spec(number)
        total, count = heldout_loss(
            self.model, world.exchange, self._task, spec, train.batch, train.eval_batches, report, self._site
        )
        self._site.check()
        return {"heldout_loss_sum": total, "heldout_tokens": count} | report.metrics()

    def _keep_basis(self, attempt: Attempt) -> None:
        """The basis changes before the step is taken: keep what is needed to put it back."""
        if self._config.compress.subspace == "learned":
            attempt.before_drop(self._agreed.restart)  # after the weights are as they were, which is undone first
        attempt.before_drop(basis.keep_basis(self.model))

    def _take_basis(self, world: World, rounds: dict[str, Round], cursor: int, number: int) -> Metrics:
        """End the warm start, or refresh: make from moments a basis that all nodes share (`node.train.basis`)."""
        config, rank, averager, site = self._config, world.rank, world.averager, self._site
        refresh = self._schedule.refreshes(number)
        moments: Moments
        seen, centred = 0, config.compress.centred
        if MOMENTS not in rounds:
            moments = basis.weight_moments(self.model)
        elif refresh:
            moments = self._running.take()
        else:
            tokens = config.compress.warm_start_tokens(config.model.chunk_tokens)
            sampler = self._sampler(tokens, derive(config.run.seed, "calibration"))
            batches = config.compress.calibration_batches
            seen = batches * config.train.batch * config.model.chunks * tokens
            moments = basis.activation_moments(self.model, world.exchange, sampler, cursor, batches, centred, site)
            site.check()
        named = {f"the second moment of layer {layer}'s {kind}": moment for (layer, kind), moment in moments.items()}
        require_finite(named, f"step {number}: no basis")
        if MOMENTS in rounds:
            basis.sum_moments(moments, averager, rounds[MOMENTS].round_id, site)
        means = basis.centre(moments, seen) if centred else None
        metrics: Metrics = {}
        if RANKS in rounds:
            payload = world.exchange.payload
            basis.share_ranks(self.model, moments, payload, rank, averager, rounds[RANKS].round_id, site)
            ranks = self.model.ranks.ranks
            metrics = {f"layer{layer}_{kind}_rank": float(chosen) for (layer, kind), chosen in ranks.items()}
        basis.share_basis(self.model, moments, rank, averager, rounds[BASIS].round_id, refresh, means, site)
        self._digests["basis"] = basis.basis_digest(self.model)
        if config.compress.subspace == "learned":  # it starts here, with weights that are equal on all nodes
            self._agreed.restart()
        return metrics | basis.energies(self.model, moments)

    def _settle_gradients(
        self, world: World, number: int, loss: Tensor, rounds: dict[str, Round]
    ) -> tuple[Tensor, bool]:
        """Average or scale the gradients, and clip them; their norm, and whether the optimizer takes them
        (`node.train.finite`)."""
        named = own_gradients(self.model)
        fault = self._guard.fault(number, loss, named)
        if fault:
            poison(list(named.values()))
        self._scale_or_average_gradients(world, rounds.get(GRADIENTS))
        norm = clip_gradients(self.model, self._config.train.grad_clip, self._site)

        def vote(faulty: float) -> float:
            return float(world.averager.total(rounds[FINITE].round_id, torch.tensor([faulty])))

        return norm, self._guard.takes(number, fault, norm, vote if FINITE in rounds else None)

    def _scale_or_average_gradients(self, world: World, entry: Round | None) -> None:
        """This node's gradient is a part of the global sum. In a round, all nodes get the sum. Without one, each node
        takes its part times 1 / share: the mean of that over nodes, weighted by shares, is the global gradient."""
        gradients = list(own_gradients(self.model).values())
        if entry:
            unflatten_into(world.averager.total(entry.round_id, flatten(gradients)), gradients)
        else:
            torch._foreach_mul_(gradients, 1.0 / world.share)

    def _common_digests(self, world: World) -> dict[str, str]:
        """The digests of all that the nodes must have in common when they begin a generation."""
        digests = {
            "assignment": world.members.assignment.digest(),
            "corpus": self._task.fingerprint,
            "weights": digest([self._common_weights()]),
        }
        return digests | ({"basis": basis.basis_digest(self.model)} if self.done else {})

    def _common_weights(self) -> Tensor:
        """The weights that all nodes have in common now."""
        return (
            self._agreed.vector if self._config.train.sync_every > 1 else flatten(own_parameters(self.model).values())
        )

    def _sampler(self, chunk_tokens: int, seed: int | None = None) -> Sampler:
        config = self._config
        context = config.model.chunks * chunk_tokens
        return self._task.sampler(context, config.train.batch, config.run.seed if seed is None else seed)
