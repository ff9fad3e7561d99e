"""[train]: optimizer, schedule, and how often things happen."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError
from node.config.compress import RingName

PipelineName = Literal["1f1b", "gpipe"]


class TrainConfig(Section, frozen=True, kw_only=True):
    """[train]: optimizer, schedule, and how often things happen."""

    steps: Annotated[int, Meta(description="Optimizer steps, including those of the warm start.", ge=1)] = 300
    batch: Annotated[int, Meta(description="Contexts in one step.", ge=1)] = 1
    micro_batches: Annotated[
        int,
        Meta(
            description="Passes into which the contexts of a step are dealt. They are in flight together: one computes "
            "while the payloads of another travel.",
            ge=1,
        ),
    ] = 1
    pipeline: Annotated[
        PipelineName,
        Meta(
            description="Order in which a pipeline stage computes the passes of a step (coordinator.stages). 1f1b: a "
            "backward after each forward as soon as there is one; gpipe: all forwards first, which keeps the "
            "activations of all passes."
        ),
    ] = "1f1b"
    lr: Annotated[float, Meta(description="Peak learning rate of AdamW.", gt=0)] = 3e-4
    lr_warmup_steps: Annotated[
        int, Meta(description="Steps over which the learning rate rises from 0 to train.lr.", ge=0)
    ] = 20
    lr_final_share: Annotated[
        float,
        Meta(
            description="Learning rate at the last step, as a share of train.lr; it falls linearly to that.", ge=0, le=1
        ),
    ] = 0.1
    weight_decay: Annotated[float, Meta(description="Weight decay of AdamW, for matrices only.", ge=0)] = 0.01
    beta1: Annotated[float, Meta(ge=0, lt=1, description="First beta of AdamW.")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="Second beta of AdamW.")] = 0.95
    grad_clip: Annotated[
        float, Meta(description="Upper bound on the norm of the whole gradient. 0: no bound.", ge=0)
    ] = 1.0
    sync_every: Annotated[
        int,
        Meta(
            description="Steps between averagings of the weights (c). 1: gradients are averaged instead, which is "
            "exact context parallelism.",
            ge=1,
        ),
    ] = 20
    sync_fragments: Annotated[
        int,
        Meta(
            description="Fragments in which weights are averaged, each one once in train.sync_every steps and at a "
            "step of its own. 1: all weights at once.",
            ge=1,
        ),
    ] = 1
    sync_delay: Annotated[
        int,
        Meta(
            description="Steps under which an averaging of weights travels before its result is applied. 0: training "
            "stops until it has come.",
            ge=0,
        ),
    ] = 0
    sync_format: Annotated[
        RingName,
        Meta(
            description="Number format in which changes of the weights are sent when they are averaged. What int8, "
            "fp8, int4 and topk10 leave out is sent at the next time. Without effect where train.sync_every = 1."
        ),
    ] = "int8"
    outer_lr: Annotated[
        float,
        Meta(
            description="Learning rate of the outer step, which is taken when weights are averaged. 1: plain "
            "averaging.",
            gt=0,
        ),
    ] = 1.0
    outer_momentum: Annotated[float, Meta(description="Nesterov momentum of the outer step. 0: none.", ge=0, lt=1)] = (
        0.0
    )
    checkpoint_every: Annotated[int, Meta(description="Steps between checkpoints. 0: only at the end.", ge=0)] = 0
    keep_last: Annotated[
        int,
        Meta(
            description="Complete checkpoints that stay on the disk; older ones are removed. With 1 there is none to "
            "go on from where the last one is damaged. 0: all stay.",
            ge=0,
        ),
    ] = 0
    collect: Annotated[
        bool,
        Meta(
            description="Whether nodes send their parts of a checkpoint to the coordinator, unless both write to the "
            "same disk. They go when training leaves the line idle. A run can then be evaluated, exported and resumed "
            "from the coordinator's folder. false: each part stays on its machine."
        ),
    ] = True
    eval_every: Annotated[
        int, Meta(description="Steps between held-out evaluations. 0: only at the start and the end.", ge=0)
    ] = 0
    nonfinite: Annotated[
        Literal["stop", "skip"],
        Meta(description="A step whose loss or gradient is not finite: stop the run, or skip the step on all nodes."),
    ] = "stop"
    eval_batches: Annotated[int, Meta(description="Number of held-out batches in one evaluation.", ge=1)] = 8

    @property
    def streams(self) -> bool:
        """Whether weights are averaged otherwise than all at once while training stops."""
        return self.sync_fragments > 1 or self.sync_delay > 0

    def check(self, path: str) -> None:
        if self.batch % self.micro_batches:
            raise ConfigError(
                f"{path}micro_batches = {self.micro_batches}: expected a divisor of {path}batch = {self.batch}"
            )
        if self.checkpoint_every % self.sync_every:
            raise ConfigError(
                f"{path}checkpoint_every = {self.checkpoint_every}: expected a multiple of "
                f"{path}sync_every = {self.sync_every}, so that a checkpoint holds agreed weights"
            )
        if self.eval_every % self.sync_every:
            raise ConfigError(
                f"{path}eval_every = {self.eval_every}: expected a multiple of "
                f"{path}sync_every = {self.sync_every}, so that agreed weights are evaluated"
            )
        for key, plain in (("outer_lr", 1.0), ("outer_momentum", 0.0), ("sync_fragments", 1), ("sync_delay", 0)):
            if self.sync_every == 1 and getattr(self, key) != plain:
                what = "the outer step is taken" if key.startswith("outer") else "fragments are sent"
                raise ConfigError(
                    f"{path}{key} = {getattr(self, key)}: expected {plain}, since {path}sync_every = 1 averages "
                    f"gradients, and {what} where weights are averaged"
                )
        if self.sync_fragments > self.sync_every:
            raise ConfigError(
                f"{path}sync_fragments = {self.sync_fragments}: expected at most {path}sync_every = "
                f"{self.sync_every}, so that each fragment has a step of its own"
            )
        turn = self.sync_every // self.sync_fragments
        if self.sync_delay > turn:
            raise ConfigError(
                f"{path}sync_delay = {self.sync_delay}: expected at most {turn} ({path}sync_every / "
                f"{path}sync_fragments), so that one fragment has arrived before the next begins"
            )
