"""The end of the warm start: from second moments to one basis, equal on every node to the bit.

Moments of the activations are summed over nodes in a round; every node finds the principal directions; rank 0's are
then copied to all in a second round, since two machines' eigensolvers need not agree in the last bit. What proves
equality is the digest that nodes send with the next barrier (`digests` in `coordinator.messages.Ready`).
"""

from __future__ import annotations

import torch

from node.config import Config
from node.data.batches import BatchSampler
from node.exchange.chunks import ChunkExchange
from node.model.llama import Llama, Moments
from node.schedule import PassSpec
from node.subspace.basis import digest, kept_energy
from node.train.averaging import Averager, flatten, unflatten_into
from node.train.passes import loss_sum


def activation_moments(
    config: Config, model: Llama, exchange: ChunkExchange, sampler: BatchSampler, cursor: int
) -> Moments:
    """ΣzᵀZ of this node's K and V over the calibration batches that begin at `cursor`, uncompressed."""
    spec = PassSpec(sampler.context // config.model.chunks, compressed=False)
    total: Moments = {}
    with torch.no_grad():
        for index in range(config.compress.calibration_batches):
            moments: Moments = {}
            contexts = sampler.contexts(cursor + index * config.train.batch)
            loss_sum(model, exchange, contexts, spec, moments)
            total = {key: total[key] + moment if total else moment for key, moment in moments.items()}
    return total


def sum_moments(moments: Moments, averager: Averager, round_id: int) -> None:
    """Replace each moment by its sum over nodes."""
    keys = sorted(moments)
    unflatten_into(averager.total(round_id, flatten(moments[key] for key in keys)), [moments[key] for key in keys])


def share_basis(model: Llama, moments: Moments, rank: int, averager: Averager, round_id: int) -> None:
    """Set every codec's basis from `moments`, and replace it by rank 0's: all others add zeros."""
    codecs = dict(model.codecs())
    for key, codec in codecs.items():
        codec.set_moments(moments[key])
    own = flatten(codec.leading for codec in codecs.values())
    shared = averager.total(round_id, own if rank == 0 else torch.zeros_like(own))
    with torch.no_grad():
        unflatten_into(shared, [codec.leading for codec in codecs.values()])
    restore_basis(model)


def restore_basis(model: Llama) -> None:
    """Make what codecs derive from their principal directions again, after these were loaded or replaced."""
    for _, codec in model.codecs():
        codec.set_basis(codec.leading.clone())


def basis_digest(model: Llama) -> str:
    """What nodes compare."""
    return digest(codec.leading for _, codec in model.codecs())


def energies(model: Llama, moments: Moments) -> dict[str, float]:
    """Share of K's and V's energy that the subspaces keep at θ = 0, the least over layers."""
    kept: dict[str, float] = {}
    for (layer, kind), codec in model.codecs():
        energy = kept_energy(moments[layer, kind], codec.leading[..., : codec.shape.rank])
        key = f"{kind}_energy_kept"
        kept[key] = min(energy, kept.get(key, 1.0))
    return kept
