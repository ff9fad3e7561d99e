"""Which rank each layer's K and V gets: by share, as the paper sets it, or from the measured spectrum for a budget.

`RankTable` holds them, once in a node. By share, ranks follow from the config. For a budget
(`compress.budget_bytes_per_token`) they are chosen once, at the end of the warm start, from the second moments that the
basis is made of: `choose_ranks` gives one direction after the other to the K or V that gains the most energy per byte.
How the choice reaches all nodes is in `node.train.basis`; the caller says what a rank costs on the wire.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from netem.errors import ConfigError
from node.config import CompressConfig, ModelConfig
from node.subspace.basis import rank_of
from node.subspace.codec import CodecShape, Key
from node.subspace.rotation import Rotation, make_rotation


class RankTable:
    """The codec shape of the K and the V of every layer that compresses.

    There is one table in a node, which codecs, payload format, planner and export all read. Where ranks are chosen in
    the run, for a budget, they are 0 until `choose` is called.
    """

    def __init__(self, shapes: Mapping[Key, CodecShape]) -> None:
        self._shapes = dict(sorted(shapes.items()))
        self.layers = tuple(sorted({layer for layer, _ in shapes}))
        """The layers that compress, in order."""

    def __getitem__(self, key: Key) -> CodecShape:
        return self._shapes[key]

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Each (layer, "k" or "v") that is compressed, in order."""
        return tuple(self._shapes)

    def of_layer(self, layer: int) -> tuple[CodecShape, ...]:
        """The shapes of a layer's codecs: that of K, and that of V."""
        return self._shapes[layer, "k"], self._shapes[layer, "v"]

    @property
    def chosen(self) -> bool:
        """Whether every rank is known. Before that nothing compressed may travel."""
        return all(shape.rank for shape in self._shapes.values())

    @property
    def ranks(self) -> dict[Key, int]:
        """The rank of every codec; 0 where it is still to be chosen."""
        return {key: shape.rank for key, shape in self._shapes.items()}

    @property
    def groups(self) -> dict[Key, int]:
        """The groups of every codec."""
        return {key: shape.groups for key, shape in self._shapes.items()}

    def choose(self, ranks: Mapping[Key, int]) -> None:
        """Ranks have been chosen, on all nodes the same."""
        assert ranks.keys() == self._shapes.keys()
        self._shapes = {key: shape._replace(rank=ranks[key]) for key, shape in self._shapes.items()}


def rotation_of(compress: CompressConfig, seed: int) -> Rotation:
    """The rotation that the config names, its generators drawn from `seed`."""
    return make_rotation(compress.rotation, seed, compress.generator_norm, compress.generators, compress.clip)


def rank_table(model: ModelConfig, compress: CompressConfig) -> RankTable:
    """The table that the config gives. Raises `ConfigError` where a rank leaves no room.

    The model's last layer, where it compresses at all, has shares of its own. With a budget all ranks are still 0.
    """
    shapes: dict[Key, CodecShape] = {}
    for layer in compress.compressed_of(model.layers):
        prefix = "last_" if layer == model.layers - 1 else ""
        shapes |= {(layer, kind): _shape(model, compress, f"{prefix}{kind}_share") for kind in "kv"}
    return RankTable(shapes)


def rank_bounds(model: ModelConfig, compress: CompressConfig) -> tuple[int, int]:
    """The least and the greatest rank that the rotation can turn: one column an angle, and room for all its columns."""
    rotation, width = rotation_of(compress, 0), _width(model, compress)
    least = rotation.parameters if compress.rotation == "geodesic" else 1
    greatest = max((rank for rank in range(1, width + 1) if rotation.columns(rank) <= width), default=0)
    return least, greatest


def spectrum(moments_GDD: Tensor) -> Tensor:
    """Share of the energy in each principal direction, strongest first, summed over groups: [D] in float64."""
    values_GD = torch.linalg.eigvalsh(moments_GDD.detach().to("cpu", torch.float64)).flip(-1).clamp_min(0.0)
    shares_D: Tensor = values_GD.sum(0) / values_GD.sum().clamp_min(1e-300)
    return shares_D


def choose_ranks(
    spectra: Mapping[Key, Tensor], least: int, greatest: int, cost_bytes: Callable[[Key, int], int], budget_bytes: float
) -> dict[Key, int]:
    """Ranks within the budget. All start at `least`; each further direction goes where it keeps the most energy a byte.

    `cost_bytes(key, rank)` is the number of bytes that a codec of this rank sends. Energy is counted as a share of each
    K's or V's own energy, since a loss in one cannot be compared with a loss in another by size. Spectra fall, so this
    choice is worse than the best one by at most one direction. Raises `ConfigError` where the budget does not reach
    `least`.
    """
    ranks = dict.fromkeys(sorted(spectra), least)
    spent_bytes = sum(cost_bytes(key, least) for key in ranks)
    if spent_bytes > budget_bytes:
        raise ConfigError(f"the least that the layers need is {spent_bytes} bytes, the budget is {budget_bytes:g}")

    def offer(key: Key) -> tuple[float, Key, int]:
        """(minus the energy per byte, key, bytes) of the next direction."""
        more_bytes = cost_bytes(key, ranks[key] + 1) - cost_bytes(key, ranks[key])
        return -float(spectra[key][ranks[key]]) / max(more_bytes, 1), key, more_bytes

    offers = [offer(key) for key in ranks if least < greatest]
    heapq.heapify(offers)
    while offers:
        _, key, more_bytes = heapq.heappop(offers)
        if spent_bytes + more_bytes > budget_bytes:
            continue  # another direction may cost less
        ranks[key] += 1
        spent_bytes += more_bytes
        if ranks[key] < greatest:
            heapq.heappush(offers, offer(key))
    return ranks


def _shape(model: ModelConfig, compress: CompressConfig, key: str) -> CodecShape:
    width, share = _width(model, compress), float(getattr(compress, key))
    rotation, rank = rotation_of(compress, 0), rank_of(share, width)
    groups = model.d_kv // width
    if compress.budget_bytes_per_token:
        return CodecShape(groups, width, 0, rotation.parameters)
    least, _ = rank_bounds(model, compress)
    if rotation.columns(rank) > width:
        raise ConfigError(
            f"compress.{key} = {share}: rotation {compress.rotation!r} wants {rotation.columns(rank)} directions "
            f"for rank {rank}, and there are {width}; raise the share, or use another rotation"
        )
    if rank < least:
        raise ConfigError(
            f"compress.{key} = {share}: leaves rank {rank}, fewer columns than compress.generators = "
            f"{compress.generators} angles; lower the share, or take fewer"
        )
    return CodecShape(groups, width, rank, rotation.parameters)


def _width(model: ModelConfig, compress: CompressConfig) -> int:
    """Width of a group: one for all heads of a layer, or one for each."""
    return model.head_size if compress.scope == "head" else model.d_kv
