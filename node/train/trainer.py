"""A training run as one node sees it: one step straight down the page.

The coordinator says which step begins, on which contexts, and which averaging rounds belong to it. The exchange moves
payloads in the forward and backward pass. What was measured goes to the coordinator with the next barrier. A trainer
lives as long as its node, and keeps nothing of the membership: each generation's world is given to it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from coordinator.messages import Go, Round, Stop
from node.config import Config
from node.config.seeds import derive
from node.data import Task
from node.data.task import Sampler, count_asked
from node.measure.spans import BACKWARD, EVALUATE, FORWARD, GO, OPTIMIZER, SAVE
from node.model.exchanged import ExchangedLlama
from node.subspace.basis import MomentProbe, Moments, digest
from node.subspace.energy import EnergyReport
from node.train import basis
from node.train.agreed import AgreedWeights
from node.train.averaging import flatten, unflatten_into
from node.train.evaluate import heldout_loss
from node.train.finite import StepGuard, poison, require_finite
from node.train.optimizer import clip_gradients, make_optimizer, set_learning_rate
from node.train.passes import loss_sum
from node.train.schedule import (
    BASIS,
    FINITE,
    GRADIENTS,
    MOMENTS,
    RANKS,
    StepSchedule,
)
from node.train.world import World

Metrics = dict[str, float]


class StepSession(Protocol):
    """The part of a session with the coordinator that begins steps (`coordinator.client.Session`)."""

    def ready(self, step: int, metrics: Metrics | None = None, digests: dict[str, str] | None = None) -> Go | Stop: ...

    def saved(self, step: int) -> None: ...


class Meter(Protocol):
    """Measures time, traffic, CPU and memory of this node (`node.worker.meter`)."""

    def begin(self, step: int) -> None:
        """Step `step` begins now, with the wait for its Go."""

    def step_metrics(self) -> Metrics:
        """What was measured in the step that ends now; the next one begins."""


class Trainer:
    """One node's training, through all generations. `done` is the number of steps that its weights have taken."""

    def __init__(self, config: Config, task: Task, model: ExchangedLlama) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, config.train)
        self.done = 0
        self._config = config
        self._task = task
        self._parameters = list(model.parameters())
        self._schedule = StepSchedule(config.model, config.compress, config.train)
        self._agreed = AgreedWeights(config.train, self._schedule, model)
        self._guard = StepGuard(config.train)
        self._running = basis.RunningMoments(config.compress.refresh_decay)
        self._digests: dict[str, str] = {}  # must be equal on all nodes, which the next barrier compares

    def resume(self, world: World, step: int) -> None:
        """Load this run's checkpoint after `step` steps."""
        self._running.total = world.checkpoints.load(step, self.model, self.optimizer, self._agreed)
        self.done = step

    def run(self, world: World, session: StepSession, meter: Meter) -> None:
        """Train in `world`, from `done` on, until the coordinator ends the run.

        Raises `GenerationOver` once the coordinator has begun a later generation, and `RunAborted` where the run ends
        before its last step.
        """
        metrics = None
        self._agreed.drop()
        self._digests = self._common_digests(world)
        meter.begin(self.done + 1)
        while isinstance(go := self._next(world, session, metrics), Go):
            self._digests = {}
            metrics = self.step(world, go)
            self.done = done = go.step + 1
            if self._schedule.saves(done):
                with world.spans.span(SAVE):
                    self._save(world, session)
            if self._schedule.evaluates(done):
                with world.spans.span(EVALUATE):
                    metrics |= self.evaluate(world, done)
            metrics |= meter.step_metrics()

    def _next(self, world: World, session: StepSession, metrics: Metrics | None) -> Go | Stop:
        with world.spans.span(GO):
            return session.ready(self.done, metrics, self._digests)

    def _save(self, world: World, session: StepSession) -> None:
        world.checkpoints.save(self.done, self.model, self.optimizer, self._running.total, self._agreed)
        session.saved(self.done)
        if "weights" not in self._digests:  # an averaging of weights has just taken it
            self._digests["weights"] = digest([self._common_weights()])

    def step(self, world: World, go: Go) -> Metrics:
        """One optimizer step, with the averaging rounds that the coordinator has named."""
        config, number = self._config, go.step + 1
        rounds = {entry.kind: entry for entry in go.rounds}
        spec = self._schedule.pass_spec(number)
        sampler = self._sampler(spec.tokens)
        metrics: Metrics = {}
        if BASIS in rounds:
            metrics |= self._take_basis(world, rounds, go.cursor, number)
        for entry in go.begins:
            self._agreed.begin(world.averager, entry, number)

        contexts = sampler.contexts(go.cursor)
        probe = MomentProbe(self.model.ranks.groups) if self._schedule.samples_moments(number) else None
        with world.spans.span(FORWARD):
            loss = loss_sum(self.model, world.exchange, contexts, spec, probe, draw=(number,))
        self._guard.check_loss(number, loss.detach())
        tokens = count_asked(contexts)
        self.optimizer.zero_grad()
        with world.spans.span(BACKWARD):
            (loss / tokens).backward()

        norm, takes = self._settle_gradients(world, number, loss.detach(), rounds)
        lr = self._schedule.learning_rate(number)
        set_learning_rate(self.optimizer, lr)
        if takes:
            with world.spans.span(OPTIMIZER):
                self.optimizer.step()
            if probe is not None:
                self._running.add(probe.moments)
        for entry in go.rounds:
            if self._agreed.averages(entry.kind):
                self._digests["weights"] = self._agreed.average(world.averager, entry, number)
        metrics |= {"loss_sum": loss.item(), "tokens": tokens * world.share, "grad_norm": float(norm), "lr": lr}
        if not takes:
            metrics["skipped"] = 1.0
        if config.leaks and spec.compressed:
            metrics["leaks"] = 1.0
        return metrics

    def evaluate(self, world: World, number: int) -> Metrics:
        """The held-out loss after step `number`, and how much of K and V the subspaces kept."""
        train, report, spec = self._config.train, EnergyReport(), self._schedule.pass_spec(number)
        total, count = heldout_loss(
            self.model, world.exchange, self._task, spec, train.batch, train.eval_batches, report
        )
        return {"heldout_loss_sum": total, "heldout_tokens": count} | report.metrics()

    def _take_basis(self, world: World, rounds: dict[str, Round], cursor: int, number: int) -> Metrics:
        """End the warm start, or refresh: make from moments a basis that all nodes share (`node.train.basis`)."""
        config, rank, averager = self._config, world.rank, world.averager
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
            moments = basis.activation_moments(self.model, world.exchange, sampler, cursor, batches, centred)
        named = {f"the second moment of layer {layer}'s {kind}": moment for (layer, kind), moment in moments.items()}
        require_finite(named, f"step {number}: no basis")
        if MOMENTS in rounds:
            basis.sum_moments(moments, averager, rounds[MOMENTS].round_id)
        means = basis.centre(moments, seen) if centred else None
        metrics: Metrics = {}
        if RANKS in rounds:
            payload = world.exchange.payload
            basis.share_ranks(self.model, moments, payload, rank, averager, rounds[RANKS].round_id)
            ranks = self.model.ranks.ranks
            metrics = {f"layer{layer}_{kind}_rank": float(chosen) for (layer, kind), chosen in ranks.items()}
        basis.share_basis(self.model, moments, rank, averager, rounds[BASIS].round_id, refresh, means)
        self._digests["basis"] = basis.basis_digest(self.model)
        if config.compress.subspace == "learned":  # it starts here, with weights that are equal on all nodes
            self._agreed.restart()
        return metrics | basis.energies(self.model, moments)

    def _settle_gradients(
        self, world: World, number: int, loss: Tensor, rounds: dict[str, Round]
    ) -> tuple[Tensor, bool]:
        """Average or scale the gradients, and clip them; their norm, and whether the optimizer takes them
        (`node.train.finite`)."""
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        fault = self._guard.fault(number, loss, named)
        if fault:
            poison(list(named.values()))
        self._scale_or_average_gradients(world, rounds.get(GRADIENTS))
        norm = clip_gradients(self.model, self._config.train.grad_clip)

        def vote(faulty: float) -> float:
            return float(world.averager.total(rounds[FINITE].round_id, torch.tensor([faulty])))

        return norm, self._guard.takes(number, fault, norm, vote if FINITE in rounds else None)

    def _scale_or_average_gradients(self, world: World, entry: Round | None) -> None:
        """This node's gradient is a part of the global sum. In a round, all nodes get the sum. Without one, each node
        takes its part times 1 / share: the mean of that over nodes, weighted by shares, is the global gradient."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
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
        return self._agreed.vector if self._config.train.sync_every > 1 else flatten(self._parameters)

    def _sampler(self, chunk_tokens: int, seed: int | None = None) -> Sampler:
        config = self._config
        context = config.model.chunks * chunk_tokens
        return self._task.sampler(context, config.train.batch, config.run.seed if seed is None else seed)
