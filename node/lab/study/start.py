"""Where a run of a study starts: at the weights that its config gives, or at those of a trunk, with noise or without.

The optimizer starts anew in every arm, and the contexts go on where the trunk's ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from node.config.seeds import derive
from node.model.exchanged import ExchangedLlama

_CODEC = ".codecs."


@dataclass(frozen=True)
class Start:
    """`weights`: a trunk's file. `noise`: as `table.Arm.noise`. `contexts`: how many the trunk has read."""

    weights: Path | None = None
    noise: float = 0.0
    contexts: int = 0

    def prepare(self, model: ExchangedLlama) -> None:
        """Give the model the weights, all but those of its codecs, which start with the basis."""
        kept = {name: tensor for name, tensor in model.named_parameters() if _CODEC not in name}
        if self.weights is not None:
            found = load_file(self.weights)
            assert found.keys() == kept.keys(), f"{self.weights} is of another model"
            with torch.no_grad():
                for name, tensor in kept.items():
                    tensor.copy_(found[name])
        if self.noise:
            self._add_noise(kept)

    def _add_noise(self, tensors: dict[str, torch.nn.Parameter]) -> None:
        for name, tensor in tensors.items():
            source = torch.Generator().manual_seed(derive(0, "noise", name))
            drawn = torch.randn(tensor.shape, generator=source)
            with torch.no_grad():
                tensor.add_(self.noise * tensor.square().mean().sqrt() * drawn)


def save_weights(model: ExchangedLlama, path: Path) -> None:
    """Keep the weights for the arms that start from them; whole or not at all."""
    named = {name: tensor.detach() for name, tensor in model.named_parameters() if _CODEC not in name}
    unfinished = path.with_suffix(".unfinished")
    save_file(named, unfinished)
    unfinished.replace(path)
