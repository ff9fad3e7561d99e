"""Contexts of several documents, and the settings with which attention stays within them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.small import VOCAB
from helpers.worlds import MODES, tiny_config
from node.config import Config
from node.data.batches import Contexts
from node.data.task import begins, mark_documents
from node.exchange.documents import Documents

END = VOCAB - 1
"""The id of end-of-text."""

ENDS = (
    (7, 12, 19),  # one ends with the first chunk of 8, one within the second, and the third crosses a border
    (),  # one document is the whole context
    (2, 3, 4, 30),  # short ones, and one over all chunks that ends just before the context does
    (10, 15, 23),  # borders of documents are borders of chunks, and only the first border of chunks is crossed
)
"""Where end-of-text stands in contexts of 32 tokens."""

DOCUMENT_MODES = {
    name: settings
    for name, settings in MODES.items()
    if settings.get("theta") != "previous" and not (settings.get("own") == "projected" and "rotation" not in settings)
} | {
    "theta of the first token": {"theta": "first"},
    "own projected, fixed": {"own": "projected", "rotation": "fixed", "dense_last_layers": 0},
}
"""The modes that keep documents apart."""


def masking_config(mode: str = "geodesic", batch: int = 4, **sections: dict[str, Any]) -> Config:
    """`tiny_config` with attention within documents, and one context for each row of `ENDS`."""
    compress = DOCUMENT_MODES[mode] | sections.pop("compress", {})
    train = {"batch": batch} | sections.pop("train", {})
    return tiny_config(compress=compress, train=train, data={"document_masking": True}, **sections)


def packed(config: Config, ends: Sequence[Sequence[int]] = ENDS, seed: int = 0) -> Contexts:
    """A batch of contexts with end-of-text in these places, marked as training contexts are."""
    shape = (config.train.batch, config.model.context + 1)
    tokens = np.random.default_rng(seed).integers(0, END, shape, dtype=np.int64)
    for row, places in zip(tokens, ends, strict=False):
        row[list(places)] = END
    return mark_documents(tokens, END)


def documents_of(config: Config, contexts: Contexts) -> Documents:
    """The documents of a pass over all of these contexts."""
    return Documents(begins(contexts[:, :-1]), config.model.chunk_tokens)


def spans(contexts: Contexts) -> list[tuple[int, int, int]]:
    """(context, begin, end) of every document."""
    found = []
    for row, starts in enumerate(begins(contexts[:, :-1])):
        edges = [0, *np.flatnonzero(starts).tolist(), len(starts)]
        found += [(row, begin, end) for begin, end in itertools.pairwise(edges)]
    return found


def by_token(parts_CBn: Sequence[Tensor], world: Sequence[Sequence[int]]) -> Tensor:
    """[B, T, …] from what each rank has for its own chunks, [C, B, n, …]."""
    order = torch.tensor([chunk for own in world for chunk in own])
    return torch.cat(list(parts_CBn))[order.argsort()].movedim(0, 1).flatten(1, 2)
