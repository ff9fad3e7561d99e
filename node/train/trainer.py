"""A training run as one node sees it: one step straight down the page.

The coordinator says which step begins, on which contexts, and which averaging rounds belong to it; the exchange
carries payloads inside forward and backward; everything measured goes to the coordinator with the next barrier.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from coordinator.messages import Go, Round, Stop
from node.config import Config
from node.config.seeds import derive
from node.data import Task
from node.data.task import Sampler, count_asked
from node.exchange.chunks import ChunkExchange
from node.model.exchanged import ExchangedLlama
from node.subspace.basis import MomentProbe, Moments, digest
from node.subspace.energy import EnergyReport
from node.train import basis
from node.train.averaging import Averager, flatten, unflatten_into
from node.train.checkpoint import Checkpoints
from node.train.evaluate import heldout_loss
from node.train.finite import StepGuard, poison, require_finite
from node.train.optimizer import clip_gradients, make_optimizer, set_learning_rate
from node.train.outer import OuterStep
from node.train.passes import loss_sum
from node.train.schedule import (
    BASIS,
    FINITE,
    GRADIENTS,
    MOMENTS,
    RANKS,
    WEIGHTS,
    evaluates,
    learning_rate,
    pass_spec,
    refreshes,
    samples_moments,
    saves,
)

Metrics = dict[str, float]


class Barrier(Protocol):
    """What the trainer says to the coordinator (`coordinator.client.Session`)."""

    def ready(self, step: int, metrics: Metrics | None = None, digests: dict[str, str] | None = None) -> Go | Stop: ...

    def saved(self, step: int) -> None: ...


class Meter(Protocol):
    """Counters of this node beyond the trainer's own (`node.worker.meter`): traffic, waiting, CPU, memory."""

    def step_metrics(self) -> Metrics: ...

    def evaluation(self) -> AbstractContextManager[None]:
        """What is measured meanwhile is the evaluation's, not the step's."""


class Trainer:
    """One node's training. `share` is this node's part of all tokens."""

    def __init__(
        self,
        config: Config,
        task: Task,
        model: ExchangedLlama,
        exchange: ChunkExchange,
        averager: Averager,
        checkpoints: Checkpoints,
    ) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, config.train)
        self._config = config
        self._task = task
        self._exchange = exchange
        self._averager = averager
        self._checkpoints = checkpoints
        self._parameters = list(model.parameters())
        self._agreed = flatten(self._parameters)
        self._outer = OuterStep(config.train)
        self._guard = StepGuard(config.train)
        self._share = len(exchange.own) / config.model.chunks
        self._running = basis.RunningMoments(config.compress.refresh_decay)
        # What nodes must have in common, compared at the next barrier.
        self._digests = {"corpus": task.fingerprint, "weights": digest([self._agreed])}

    def resume(self, step: int) -> None:
        """Go on from this run's checkpoint after `step` steps."""
        self._running.total = self._checkpoints.load(step, self.model, self.optimizer, self._outer)
        self._agreed = flatten(self._parameters)
        self._digests |= {"weights": digest([self._agreed]), "basis": basis.basis_digest(self.model)}

    def run(self, first_step: int, barrier: Barrier, meter: Meter) -> None:
        """Train from `first_step` steps done until the coordinator says stop."""
        done, metrics = first_step, None
        while isinstance(go := barrier.ready(done, metrics, self._digests), Go):
            self._digests = {}
            began = time.monotonic()
            metrics = self.step(go)
            metrics["step_s"] = time.monotonic() - began
            done = go.step + 1
            if saves(self._config, done):
                self._checkpoints.save(done, self.model, self.optimizer, self._running.total, self._outer)
                barrier.saved(done)
                if "weights" not in self._digests:  # an averaging of weights has just taken it
                    self._digests["weights"] = digest([flatten(self._parameters)])
            if evaluates(self._config, done):
                with meter.evaluation():
                    metrics |= self.evaluate(done)
            metrics |= meter.step_metrics()

    def step(self, go: Go) -> Metrics:
        """One optimizer step, and what the schedule adds to it."""
        config, number = self._config, go.step + 1
        rounds = {entry.kind: entry for entry in go.rounds}
        spec = pass_spec(config, number)
        sampler = self._sampler(spec.tokens)
        metrics: Metrics = {}
        if BASIS in rounds:
            metrics |= self._take_basis(rounds, go.cursor, number)

        contexts = sampler.contexts(go.cursor)
        probe = MomentProbe(self.model.ranks.groups) if samples_moments(config, number) else None
        loss = loss_sum(self.model, self._exchange, contexts, spec, probe, draw=(number,))
        self._guard.check_loss(number, loss.detach())
        tokens = count_asked(contexts)
        self.optimizer.zero_grad()
        (loss / tokens).backward()

        norm, takes = self._settle_gradients(number, loss.detach(), rounds)
        lr = learning_rate(config, number)
        set_learning_rate(self.optimizer, lr)
        if takes:
            self.optimizer.step()
            if probe is not None:
                self._running.add(probe.moments)
        if WEIGHTS in rounds:
            self._average_weights(number, rounds[WEIGHTS])
        metrics |= {"loss_sum": loss.item(), "tokens": tokens * self._share, "grad_norm": float(norm), "lr": lr}
        if not takes:
            metrics["skipped"] = 1.0
        if config.leaks and spec.compressed:
            metrics["leaks"] = 1.0
        return metrics

    def evaluate(self, number: int) -> Metrics:
        """The held-out loss after step `number`, and how much of K and V the subspaces kept."""
        train, report, spec = self._config.train, EnergyReport(), pass_spec(self._config, number)
        total, count = heldout_loss(
            self.model, self._exchange, self._task, spec, train.batch, train.eval_batches, report
        )
        return {"heldout_loss_sum": total, "heldout_tokens": count} | report.metrics()

    def _take_basis(self, rounds: dict[str, Round], cursor: int, number: int) -> Metrics:
        """End the warm start, or refresh: from moments to a basis that all nodes share (`node.train.basis`)."""
        config, rank, refresh = self._config, self._exchange.rank, refreshes(self._config, number)
        moments: Moments
        if MOMENTS not in rounds:
            moments = basis.weight_moments(self.model)
        elif refresh:
            moments = self._running.take()
        else:
            sampler = self._sampler(config.warmup_chunk_tokens, derive(config.run.seed, "calibration"))
            moments = basis.activation_moments(config, self.model, self._exchange, sampler, cursor)
        named = {f"the second moment of layer {layer}'s {kind}": moment for (layer, kind), moment in moments.items()}
        require_finite(named, f"step {number}: no basis")
        if MOMENTS in rounds:
            basis.sum_moments(moments, self._averager, rounds[MOMENTS].round_id)
        metrics: Metrics = {}
        if RANKS in rounds:
            payload = self._exchange.payload
            basis.share_ranks(config, self.model, moments, payload, rank, self._averager, rounds[RANKS].round_id)
            ranks = self.model.ranks.ranks
            metrics = {f"layer{layer}_{kind}_rank": float(chosen) for (layer, kind), chosen in ranks.items()}
        basis.share_basis(self.model, moments, rank, self._averager, rounds[BASIS].round_id, refresh)
        self._digests["basis"] = basis.basis_digest(self.model)
        # A learned subspace starts here, as weights that all nodes have alike; momentum is of the weights before it.
        if config.compress.subspace == "learned":
            self._agreed, self._outer.velocity = flatten(self._parameters), None
        return metrics | basis.energies(self.model, moments)

    def _settle_gradients(self, number: int, loss: Tensor, rounds: dict[str, Round]) -> tuple[Tensor, bool]:
        """Average or scale the gradients, and clip them; their norm, and whether the optimizer takes them
        (`node.train.finite`)."""
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        fault = self._guard.fault(number, loss, named)
        if fault:
            poison(list(named.values()))
        self._scale_or_average_gradients(rounds.get(GRADIENTS))
        norm = clip_gradients(self.model, self._config.train.grad_clip)

        def vote(faulty: float) -> float:
            return float(self._averager.total(rounds[FINITE].round_id, torch.tensor([faulty])))

        return norm, self._guard.takes(number, fault, norm, vote if FINITE in rounds else None)

    def _scale_or_average_gradients(self, entry: Round | None) -> None:
        """This node's gradient is a part of the global sum. With a round, all get the sum; without, each takes its
        part times 1 / share, so that the mean over nodes, weighted by their shares, is the global gradient."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if entry:
            unflatten_into(self._averager.total(entry.round_id, flatten(gradients)), gradients)
        else:
            torch._foreach_mul_(gradients, 1.0 / self._share)

    def _average_weights(self, number: int, entry: Round) -> None:
        """W ← W₀ + outer step of Σ wᵢ (Wᵢ − W₀), with W₀ the last agreed weights. What is sent is the difference."""
        weight = entry.weights[self._exchange.rank]
        change = (flatten(self._parameters) - self._agreed) * weight
        self._agreed += self._outer(self._averager.total(entry.round_id, change))
        require_finite({"their average": self._agreed}, f"step {number}: no agreed weights")
        with torch.no_grad():
            unflatten_into(self._agreed, self._parameters)
        self._digests["weights"] = digest([self._agreed])

    def _sampler(self, chunk_tokens: int, seed: int | None = None) -> Sampler:
        config = self._config
        context = config.model.chunks * chunk_tokens
        return self._task.sampler(context, config.train.batch, config.run.seed if seed is None else seed)
