"""`isthmus eval`: the held-out loss of a checkpoint, computed by one node that owns all chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coordinator.records.folder import CONFIG, EVALUATION, is_complete, latest_complete, read_mark, step_of, whole_file
from netem.config import apply_overrides, convert, load_toml
from netem.errors import ConfigError, IsthmusError
from node.config import Config


class Evaluation(NamedTuple):
    """A held-out loss, in nats per token."""

    step: int
    loss: float
    tokens: int
    leaks: bool = False
    """Whether tokens were told of later ones (`Config.leaks`)."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(path: Path, batches: int, overrides: Sequence[str] = ()) -> Evaluation:
    """Evaluate a checkpoint, or the last complete one of a run, and write `evaluation.json` beside it.

    `batches` bounds the walk over the held-out tokens; 0 walks them all. The mode is the checkpoint's: compressed
    from the end of its warm start until it is unplugged. Raises `ConfigError` for a checkpoint that is not sound or was
    trained on another corpus, and `IsthmusError` where the loss is not finite; `evaluation.json` is not written then.
    """
    checkpoint = find_checkpoint(path)
    result = _evaluate(checkpoint_config(checkpoint, overrides), checkpoint, batches)
    if not math.isfinite(result.loss):
        raise IsthmusError(f"{checkpoint}: the held-out loss is {result.loss}; use an earlier checkpoint")
    facts = result._asdict() | {"perplexity": result.perplexity}
    path = checkpoint / EVALUATION
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(facts, allow_nan=False) + "\n")
    except OSError as error:
        raise IsthmusError(f"{path}: cannot be written: {error.strerror}") from None
    return result


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the last complete one of the run's folder."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give outputs/RUN, or outputs/RUN/checkpoint/step-N")
    if step_of(path) >= 0:
        if not is_complete(path):
            raise ConfigError(f"{path}: is not complete (a node had not saved its part); use another checkpoint")
        read_mark(path)
        return path
    found = latest_complete(path)
    if found is None:
        raise ConfigError(f"{path}: holds no complete checkpoint; give outputs/RUN, or outputs/RUN/checkpoint/step-N")
    read_mark(found)
    return found


def checkpoint_config(checkpoint: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a checkpoint was trained with, for one node that owns all chunks, however many trained it."""
    tree = apply_overrides(load_toml(checkpoint.parent.parent / CONFIG), overrides)
    tree["coordinator"] = {}
    return convert(Config, tree)


def _evaluate(config: Config, checkpoint: Path, batches: int) -> Evaluation:
    # torch takes seconds to import: a mistyped path should not.
    from coordinator.assignment import assign
    from node.data import open_data
    from node.exchange.chunks import ChunkExchange
    from node.train.checkpoint import load_model, vocab_size_of
    from node.train.evaluate import heldout_loss
    from node.train.from_config import drawn_model, payload_format
    from node.train.schedule import StepSchedule
    from node.worker.node import choose_device

    device = choose_device(config.run)
    task = open_data(config.data)
    # A folder that a run began from may embed more tokens than its tokenizer has.
    vocab_size = vocab_size_of(checkpoint) if config.model.init else task.vocab_size
    model = drawn_model(config, vocab_size).to(device)
    load_model(checkpoint, model, task.fingerprint)
    exchange = ChunkExchange(assign(config.model.chunks, 1), 0, payload_format(config, model.ranks))
    spec = StepSchedule(config.model, config.compress, config.train).pass_spec(step_of(checkpoint))
    total, tokens = heldout_loss(model, exchange, task, spec, config.train.batch, batches or 1 << 60)
    return Evaluation(step_of(checkpoint), total / tokens, tokens, config.leaks and spec.compressed)
