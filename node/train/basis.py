"""From second moments to one basis, equal on every node to the bit: at the end of the warm start, and at refreshes.

Moments of the activations are summed over nodes in a round; every node finds the principal directions; rank 0's are
then copied to all in a second round, since two machines' eigensolvers need not agree in the last bit. Where ranks are
chosen for a budget, rank 0's choice is shared first, in a round of its own: a node that has taken part in the basis
round knows the ranks by then, so that every payload has a shape that its reader knows. The digests that nodes send with
the next barrier prove that all have the same basis (`digests` in `coordinator.messages.Ready`).

A refresh takes the basis anew and keeps the ranks. The optimizer's state stays as it is: the weights and ψ, and so
AdamW's moments of them, are in coordinates of Z, which a refresh does not touch. Only the projection changes, by as
much as the subspace has moved. `node.subspace.basis.align` keeps the coordinates within the subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from node.data.task import Sampler
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.exchange.payload import PayloadFormat
from node.model.exchanged import ExchangedLlama
from node.site.sharding import whole
from node.site.site import ALONE, Site
from node.subspace.basis import SUM, MomentProbe, Moments, digest, group_moments, kept_energy
from node.subspace.learned import CentredCodec
from node.subspace.ranks import choose_ranks, spectrum
from node.train.averaging import Averager, flatten, unflatten_into
from node.train.passes import loss_sum


def weight_moments(model: ExchangedLlama) -> Moments:
    """WᵀW of the projections that make K and V (Z = XW), by layer: the paper's source of the basis."""
    moments: Moments = {}
    for (layer, kind), groups in model.ranks.groups.items():
        projection = model.get_submodule(f"layers.{layer}.self_attn.{kind}_proj")
        assert isinstance(projection, nn.Linear)
        moments[layer, kind] = group_moments(whole(projection.weight).detach().float().mT, groups)
    return moments


def activation_moments(
    model: ExchangedLlama,
    exchange: ChunkExchange,
    sampler: Sampler,
    cursor: int,
    batches: int,
    sums: bool = False,
    site: Site = ALONE,
) -> Moments:
    """ΣzᵀZ of this node's K and V over the calibration batches that begin at `cursor`, uncompressed; with `sums`, Σz
    too. Of a site each process has those of its contexts.

    `sampler` draws other contexts than those of training: a basis fitted to what the next steps train on would look
    better than it is.
    """
    spec = PassSpec(sampler.context // exchange.payload.chunks, compressed=False)
    total: Moments = {}
    with torch.no_grad():
        for _ in range(batches):
            probe, contexts = MomentProbe(model.ranks.groups, sums), sampler.contexts(cursor)
            loss_sum(model, exchange, site.part(contexts), spec, probe)
            cursor += len(contexts)
            total = {key: total[key] + moment if total else moment for key, moment in probe.moments.items()}
    return total


def sum_moments(moments: Moments, averager: Averager, round_id: int, site: Site = ALONE) -> None:
    """Replace each moment by its sum over the site and over nodes."""
    keys = sorted(moments)
    held = [moments[key] for key in keys]
    unflatten_into(averager.total(round_id, _summed_over(site, held)), held)


def _summed_over(site: Site, held: Sequence[Tensor]) -> Tensor:
    return site.sum(torch.cat([tensor.reshape(-1) for tensor in held])) if site.several else flatten(held)


def centre(moments: Moments, tokens: int) -> Moments:
    """Turn second moments, summed over `tokens`, into mean products of what is centred; the means [G, D] by codec.

    The sums, which must be among the moments, are taken out of them.
    """
    means = {}
    for layer, kind in [key for key in moments if key[1].endswith(SUM)]:
        key = (layer, kind.removesuffix(SUM))
        mean_G1D = moments.pop((layer, kind)).double() / tokens
        moments[key] = (moments[key].double() / tokens - mean_G1D.mT @ mean_G1D).float()
        means[key] = mean_G1D.squeeze(1).float()
    return means


def share_ranks(
    model: ExchangedLlama,
    moments: Moments,
    payload: PayloadFormat,
    rank: int,
    averager: Averager,
    round_id: int,
    site: Site = ALONE,
) -> None:
    """Choose ranks for the budget from the spectra of `moments`, rank 0's for all, and enter them in the rank table.
    Of a site the first process chooses."""
    codecs = dict(model.codecs())
    own = torch.zeros(len(codecs))
    if rank == 0:
        found = choose_ranks(
            {key: spectrum(moments[key]) for key in codecs},
            *payload.rank_bounds,
            payload.codec_bytes,
            payload.budget_bytes,
        )
        own = torch.tensor([float(found[key]) for key in codecs])
    shared = averager.total(round_id, own)
    shared = site.share(shared)
    model.ranks.choose({key: int(chosen) for key, chosen in zip(codecs, shared.tolist(), strict=True)})


def share_basis(
    model: ExchangedLlama,
    moments: Moments,
    rank: int,
    averager: Averager,
    round_id: int,
    refresh: bool = False,
    means: Moments | None = None,
    site: Site = ALONE,
) -> None:
    """Set every codec's basis from `moments`, and replace it by rank 0's: all others add zeros. At a refresh it is
    aligned to the basis that the codec has. The processes of a site take that of its first one."""
    codecs = dict(model.codecs())
    for key, codec in codecs.items():
        codec.set_moments(moments[key], codec.leading.clone() if refresh else None)
        if isinstance(codec, CentredCodec):
            assert means is not None
            codec.set_centre(moments[key], means[key])
    held = [tensor for codec in codecs.values() for tensor in codec.shared()]
    own = flatten(held)
    shared = averager.total(round_id, own if rank == 0 else torch.zeros_like(own))
    shared = site.share(shared)
    with torch.no_grad():
        unflatten_into(shared, held)
    restore_basis(model)
    for codec in codecs.values():
        codec.start()


def restore_basis(model: ExchangedLlama) -> None:
    """Let every codec derive its directions again, after its principal directions were loaded or replaced."""
    for _, codec in model.codecs():
        codec.set_basis(codec.leading.clone())


def keep_basis(model: ExchangedLlama) -> Callable[[], None]:
    """What puts bases and ranks back as they are now, and with them the trained matrices of a learned subspace."""
    ranks = model.ranks.ranks
    kept = [
        (codec, codec.leading.clone(), bool(codec.directions), [p.detach().clone() for p in codec.parameters()])
        for _, codec in model.codecs()
    ]

    def put_back() -> None:
        model.ranks.choose(ranks)
        for codec, leading, has_basis, parameters in kept:
            codec.leading = leading.clone()
            for parameter, value in zip(codec.parameters(), parameters, strict=True):
                parameter.data = value.clone()  # its shape may be another one by now
            if has_basis:
                codec.set_basis(leading)
            else:
                codec.directions = ()

    return put_back


def basis_digest(model: ExchangedLlama) -> str:
    """The digest of bases and ranks that nodes compare."""
    ranks = torch.tensor(list(model.ranks.ranks.values()))
    return digest([ranks, *(tensor for _, codec in model.codecs() for tensor in codec.shared())])


def energies(model: ExchangedLlama, moments: Moments) -> dict[str, float]:
    """Share of K's and V's energy that the subspaces keep at θ = 0, the least over layers."""
    kept: dict[str, float] = {}
    for (layer, kind), codec in model.codecs():
        energy = kept_energy(moments[layer, kind], codec.leading[..., : codec.shape.rank])
        key = f"{kind}_energy_kept"
        kept[key] = min(energy, kept.get(key, 1.0))
    return kept


class RunningMoments:
    """Second moments of this node's K and V in training passes, from which the basis is refreshed. No tensor and no
    dictionary of `total` is written to, so what it was can be put back.

    They are the sums since the last refresh, plus `decay` times the sums before it. Only a few steps are sampled
    (`node.train.schedule.samples_moments`), so that the cost is small.
    """

    def __init__(self, decay: float) -> None:
        self.total: Moments = {}
        self._decay = decay

    def add(self, moments: Moments) -> None:
        """Add the moments of one pass."""
        added = {key: self.total[key] + moment if key in self.total else moment for key, moment in moments.items()}
        self.total = self.total | added

    def take(self) -> Moments:
        """A copy of the moments now; from here on they count `decay` times."""
        taken = {key: moment.clone() for key, moment in self.total.items()}
        self.total = {key: moment * self._decay for key, moment in self.total.items()}
        return taken
