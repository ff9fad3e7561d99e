"""What happens at which step: pure functions of the config, the same on the coordinator and on every node.

Steps count from 1: step s is the one that ends with s steps done. Rounds of one step happen in the order given
here, each on all nodes or on none. No torch here: the coordinator needs only this.
"""

from __future__ import annotations

from typing import NamedTuple

from node.config import Config

MOMENTS, BASIS, GRADIENTS, WEIGHTS = "moments", "basis", "gradients", "weights"


class PassSpec(NamedTuple):
    """One pass over the model: how many tokens its chunks have, and whether layers with a codec compress."""

    tokens: int
    compressed: bool


def rounds_for(config: Config, step: int) -> list[str]:
    """The averaging rounds of `step`.

    The step after the warm start begins with the basis: the activations' moments are summed, and rank 0's basis is
    copied to all. With sync_every = 1 gradients are averaged in each step (exact context parallelism), otherwise
    weights every sync_every steps, at the end of the warm start, and at the end.
    """
    rounds = []
    if config.compressed_layers and step == config.warmup_steps + 1:
        rounds += [MOMENTS, BASIS] if config.compress.basis == "activations" else [BASIS]
    every = config.train.sync_every
    if every == 1:
        rounds.append(GRADIENTS)
    elif step % every == 0 or step in (config.warmup_steps, config.train.steps):
        rounds.append(WEIGHTS)
    return rounds


def pass_spec(config: Config, step: int) -> PassSpec:
    """Chunk length and compression of the passes of `step`."""
    if step <= config.warmup_steps:
        return PassSpec(config.warmup_chunk_tokens, compressed=False)
    return PassSpec(config.model.chunk_tokens, compressed=config.compressed_layers > 0)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `lr`, then linear decay to its final share at the last step (the paper's schedule)."""
    train = config.train
    if step <= train.lr_warmup_steps:
        return train.lr * step / train.lr_warmup_steps
    done = (step - train.lr_warmup_steps) / max(1, train.steps - train.lr_warmup_steps)
    return train.lr * (1.0 - (1.0 - train.lr_final_share) * done)


def saves(config: Config, step: int) -> bool:
    """Whether a checkpoint is written after `step`."""
    every = config.train.checkpoint_every
    return step == config.train.steps or (every > 0 and step % every == 0)


def evaluates(config: Config, step: int) -> bool:
    """Whether the held-out loss is taken after `step`: at the first, the last, and every eval_every.

    During the warm start it is taken at that context length too: the narrow links could not carry more.
    """
    every = config.train.eval_every
    return step in (1, config.train.steps) or (every > 0 and step % every == 0)
