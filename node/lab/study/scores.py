"""Held-out losses summed by class and document: what a page about far context is made of (`node.lab.study.far`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from node.config import ModelConfig
from node.config.data import COPIES_BACK
from node.data import Task
from node.data.copies import Copies
from node.lab.study.far import BORDER, BORDER_CLASS, DOCUMENTS, FAR, FIRST_CHUNK, TEXT


def far_scores(model: ModelConfig, task: Task, losses_DT: Tensor, asked_DT: Tensor) -> dict[str, list[list[float]]]:
    """By class, the sum of losses in nats and the number of targets of each document, from those of all held-out
    targets [contexts, T]."""
    places = torch.arange(model.context)
    offset, chunk = places % model.chunk_tokens, places // model.chunk_tokens
    scored = asked_DT & (chunk >= FIRST_CHUNK)
    masks = {FAR: scored & (offset >= BORDER), BORDER_CLASS: scored & (offset < BORDER)}
    masks[TEXT] = torch.ones_like(asked_DT)
    if isinstance(task, Copies):
        _, distances = task.heldout(model.context, 0, len(losses_DT))
        back = torch.from_numpy(np.stack(distances)[:, 1:])
        part = model.context // COPIES_BACK
        for least in range(part, model.context - part, part):
            last = least + 2 * part >= model.context
            masks[str(least)] = masks[FAR] & (back >= least) & (last | (back < least + part))
    parts = [part.tolist() for part in torch.arange(len(losses_DT)).tensor_split(min(DOCUMENTS, len(losses_DT)))]
    return {name: [_sums(losses_DT[part], mask[part]) for part in parts] for name, mask in masks.items()}


def _sums(losses: Tensor, mask: Tensor) -> list[float]:
    return [round(float(losses[mask].sum()), 4), int(mask.sum())]
