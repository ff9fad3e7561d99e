"""Small models with everything in play: a basis that is not trivial, rotation heads that are not zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from netem.config import convert
from node.config import Config
from node.data.batches import Contexts
from node.model.exchanged import ExchangedLlama
from node.subspace.learned import CentredCodec, LearnedCodec
from node.train.from_config import drawn_model
from node.train.schedule import StepSchedule

VOCAB = 101
EXACT = {"format": "float32", "dense_last_layers": 1}
"""Nothing is rounded, and a layer of each kind."""


def small_config(
    mode: str = "subspace", *, batch: int = 2, model: dict[str, Any] | None = None, **compress: Any
) -> Config:
    """Three layers of GQA, four chunks of 16 tokens; ranks of 6 and 13 of 32."""
    sizes = {"layers": 3, "d_model": 64, "heads": 4, "kv_heads": 2, "ffn_dim": 96, "context": 64, "chunks": 4}
    tree = {
        "model": sizes | (model or {}),
        "compress": EXACT | {"mode": mode, "k_share": 0.8, "v_share": 0.6} | compress,
        "train": {"batch": batch},
    }
    return convert(Config, tree)


def schedule_of(config: Config) -> StepSchedule:
    """What happens at which step of a run."""
    return StepSchedule(config.model, config.compress, config.train)


def small_model(config: Config) -> ExchangedLlama:
    """The same weights, basis and ψ at every call; a subspace that is learned has left its basis."""
    model = drawn_model(config, VOCAB)
    for index, (_, codec) in enumerate(model.codecs()):
        source = torch.Generator().manual_seed(index)
        rows = torch.randn(codec.shape.groups, 4 * codec.shape.width, codec.shape.width, generator=source)
        codec.set_moments(rows.mT @ rows)
        if isinstance(codec, CentredCodec):
            mean = torch.randn(codec.mean.shape, generator=source)
            codec.set_centre(rows.mT @ rows / rows.shape[1], mean)
        codec.start()
        if isinstance(codec, LearnedCodec):
            with torch.no_grad():
                for matrix in codec.matrices():
                    matrix += 0.1 * torch.randn(matrix.shape, generator=source)
        if codec.psi is not None:
            torch.nn.init.normal_(codec.psi, std=1.0, generator=source)
    return model


def contexts(config: Config, seed: int = 0) -> Contexts:
    """A batch of random contexts, [batch, context + 1]."""
    shape = (config.train.batch, config.model.context + 1)
    return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int64)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over the weights that make K and V, where what formats round away shows most."""
    keys = [name for name in other if "k_proj" in name or "v_proj" in name]
    a, b = (torch.cat([tensors[key].flatten() for key in keys]) for tensors in (one, other))
    return float((a - b).norm() / b.norm())


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors of equal names: max |a − b| / max |b|."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)
