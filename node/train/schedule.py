"""What happens at which step: the same on the coordinator and on every node, since it depends on the config alone.

Steps count from 1: step s is the one that ends with s steps done. Rounds of one step happen in the order given
here, each on all nodes or on none. No torch here: the coordinator needs only this.
"""

from __future__ import annotations

from coordinator.plan import TAKE
from node.config import CompressConfig, FormatName, ModelConfig, TrainConfig
from node.exchange.passes import PassSpec

MOMENTS, RANKS, BASIS, GRADIENTS, WEIGHTS = "moments", "ranks", "basis", "gradients", "weights"
FINITE = "finite"
"""A round of one number: on how many nodes this step's loss or gradient is not finite."""

MOMENT_SAMPLES = 16
"""Training passes between two refreshes in which second moments are taken, about: each costs about as much as K and V
themselves."""


class StepSchedule:
    """Rounds, passes, learning rate, checkpoints and evaluations, by step."""

    def __init__(self, model: ModelConfig, compress: CompressConfig, train: TrainConfig) -> None:
        self._compress, self._train = compress, train
        self._warm_start = PassSpec(compress.warm_start_tokens(model.chunk_tokens), compressed=False)
        self._full = PassSpec(model.chunk_tokens, compress.compresses)

    def rounds(self, step: int) -> list[str]:
        """The averaging rounds of `step`.

        The step after the warm start begins with the basis: the activations' moments are summed, ranks are chosen if
        there is a budget for them, and rank 0's basis is copied to all. A refresh does so again, with the ranks as they
        are. With sync_every = 1 gradients are averaged in each step (exact context parallelism), otherwise weights
        every sync_every steps, at the end of the warm start, and at the end. Where weights are averaged in fragments,
        each of them has its own turn; those that travel under the steps are not here, but in `begins` and `ends`.
        Steps that are not finite are skipped by all nodes or by none: where gradients are averaged all nodes see the
        same one, otherwise a round of one number tells them.

        A step is taken by all nodes or by none, which the next step's Go tells them (`node.train.attempt`). Where
        something follows within the step that needs its weights, a round without data (TAKE) tells them before that.
        """
        compress, train, rounds = self._compress, self._train, list[str]()
        first = compress.compresses and step == compress.warm_start_steps + 1
        if first or self.refreshes(step):
            rounds += [MOMENTS] if compress.basis == "activations" else []
            rounds += [RANKS] if first and compress.budget_bytes_per_token else []
            rounds.append(BASIS)
        every = train.sync_every
        if every == 1:
            rounds.append(GRADIENTS)
        elif train.nonfinite == "skip":
            rounds.append(FINITE)
        averages = every > 1 and (self.closes(step) or (step % every == 0 and not train.streams))
        if averages or self._due(step) or self.saves(step) or self.evaluates(step):
            rounds.append(TAKE)
        if averages:
            rounds.append(WEIGHTS)
        return rounds if train.sync_delay else rounds + self._due(step)

    def begins(self, step: int) -> list[str]:
        """The fragments that begin to travel at the start of `step`, under whose computation they are on their way."""
        delay = self._train.sync_delay
        return self._due(step + delay - 1) if delay else []

    def ends(self, step: int) -> list[str]:
        """The fragments that have travelled under the steps before, and are agreed on and applied at the end of
        `step`."""
        return self._due(step) if self._train.sync_delay else []

    def _due(self, step: int) -> list[str]:
        """The fragment of the weights that is applied at the end of `step`, if any.

        In each interval of sync_every steps every fragment has its turn, the last one at the interval's end. None has
        its turn where all weights are averaged while it would travel, or have just been when it would begin. So nothing
        is under way at a checkpoint, whose step ends an interval or the run.
        """
        train = self._train
        if train.sync_every == 1 or not train.streams:
            return []
        place = step % train.sync_every or train.sync_every
        turns = [turn * train.sync_every // train.sync_fragments for turn in range(1, train.sync_fragments + 1)]
        if place not in turns or any(self.closes(past) for past in range(step - train.sync_delay, step + 1)):
            return []
        return [self.fragment_kinds()[turns.index(place)]]

    def closes(self, step: int) -> bool:
        """Whether the nodes' weights become equal at the end of `step` because something needs equal weights: the
        start, the end of the warm start, a new basis, and the end."""
        return step in (0, self._compress.warm_start_steps, self._train.steps) or self.refreshes(step + 1)

    def alone(self, done: int) -> int:
        """For how many of `done` steps each node has changed its weights alone, since all of them were last averaged.
        Where that is done in fragments, it is the age of the oldest."""
        every = self._train.sync_every
        averaged = (step for step in range(done, 0, -1) if self.closes(step) or step % every == 0)
        return done - next(averaged, 0)

    def fragment_kinds(self) -> list[str]:
        """The kinds of round that average one fragment of the weights, by fragment (`node.train.fragments`)."""
        count = self._train.sync_fragments
        return [f"fragment {index} of {count}" for index in range(1, count + 1)]

    def sync_format(self, step: int) -> FormatName:
        """The format of the averaging of weights in `step`. What a format with few bits has left out for the next time
        is not left out where weights must be equal: there it is sent whole."""
        form = self._train.sync_format
        return "float32" if self.closes(step) and form not in ("float32", "bfloat16") else form

    def refreshes(self, step: int) -> bool:
        """Whether `step` begins with a new basis: weights were averaged at the end of the one before, and a whole
        interval of compressed steps lies behind."""
        every, done = self._compress.refresh_every, step - 1
        refreshing = self.pass_spec(step).compressed and every > 0
        return refreshing and done % every == 0 and done >= self._compress.warm_start_steps + every

    def samples_moments(self, step: int) -> bool:
        """Whether the training pass of `step` adds to the moments of the next refresh."""
        every = self._compress.refresh_every
        running = self.pass_spec(step).compressed and every > 0 and self._compress.basis == "activations"
        return running and step % max(1, every // MOMENT_SAMPLES) == 0

    def pass_spec(self, step: int) -> PassSpec:
        """Chunk length and compression of the passes of `step`: whole in the warm start, and again once unplugged."""
        if step <= self._compress.warm_start_steps:
            return self._warm_start
        return self._full._replace(compressed=False) if self._compress.is_unplugged_at(step) else self._full

    def phase(self, step: int) -> str:
        """What is special about `step`, in words; "" where nothing is."""
        if step <= self._compress.warm_start_steps:
            return "warm start, uncompressed"
        return "unplugged, uncompressed" if self._compress.is_unplugged_at(step) else ""

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then linear decay to its final share at the last step (the paper's schedule).

        The steps after unplugging may decay anew, from a lower rate (`compress.unplug_lr_share`; the paper's "short
        fine-tuning at low learning rate"), and are never above what the schedule without them gives.
        """
        train, compress = self._train, self._compress
        if step <= train.lr_warmup_steps:
            rate = train.lr * step / train.lr_warmup_steps
        else:
            rate = self._decayed(train.lr, train.lr_warmup_steps, step)
        if compress.is_unplugged_at(step):
            began = max(compress.unplug_step, train.lr_warmup_steps)
            rate = min(rate, self._decayed(train.lr * compress.unplug_lr_share, began, step))
        return rate

    def _decayed(self, rate: float, began: int, step: int) -> float:
        """What is left of `rate` when it falls from step `began` to the last."""
        done = (step - began) / max(1, self._train.steps - began)
        return rate * (1.0 - (1.0 - self._train.lr_final_share) * done)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""
        every = self._train.checkpoint_every
        return step == self._train.steps or (every > 0 and step % every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is taken after `step`: at the first, the last, and every eval_every.

        During the warm start it is taken at that context length too: the narrow links could not carry more.
        """
        every = self._train.eval_every
        return step in (1, self._train.steps) or (every > 0 and step % every == 0)
