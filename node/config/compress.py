"""[compress]: what crosses the network in place of K and V (the paper's section 4)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError

EXACT_CLIP = 3.0
"""Largest angle of `exact`: terms of its series are up to e³ = 20 times their sum."""

FormatName = Literal["float32", "bfloat16", "int8", "fp8", "int4", "topk10"]
"""How a tensor crosses the wire: `node.exchange.formats`."""


class CompressConfig(Section, frozen=True, kw_only=True):
    """[compress]: what crosses the network in place of K and V (the paper's section 4)."""

    mode: Annotated[
        Literal["subspace", "dense", "local"],
        Meta(description="subspace: compressed; dense: K and V as they are; local: no remote attention, no bytes."),
    ] = "subspace"
    k_share: Annotated[
        float, Meta(description="Share of K that is compressed away; the rank is the rest.", ge=0, lt=1)
    ] = 0.98
    v_share: Annotated[float, Meta(description="Share of V that is compressed away.", ge=0, lt=1)] = 0.95
    last_k_share: Annotated[
        float, Meta(description="k_share of the last layer, where dense_last_layers = 0 compresses it.", ge=0, lt=1)
    ] = 0.9
    last_v_share: Annotated[float, Meta(description="v_share of the last layer, likewise.", ge=0, lt=1)] = 0.8
    budget_bytes_per_token: Annotated[
        float,
        Meta(
            description="Choose ranks after the warm start, where the spectrum has most energy, so that the compressed "
            "layers' K and V together send this much of a token to a reader; 0 keeps to the shares.",
            ge=0,
        ),
    ] = 0.0
    scope: Annotated[
        Literal["layer", "head"],
        Meta(description="One subspace over all heads of a layer, or one for each head."),
    ] = "layer"
    basis: Annotated[
        Literal["activations", "weights"],
        Meta(description="Principal directions of what is sent (K and V), or of the weights that make them."),
    ] = "activations"
    subspace: Annotated[
        Literal["frozen", "learned"],
        Meta(
            description="The basis as it was taken (the paper), or the start of matrices that are trained on; these do "
            'not turn (rotation = "fixed").'
        ),
    ] = "frozen"
    rotation: Annotated[
        Literal["geodesic", "taylor2", "exact", "fixed", "random"],
        Meta(description="How a chunk turns the shared basis."),
    ] = "geodesic"
    generator_norm: Annotated[
        Literal["frobenius", "spectral"],
        Meta(description="Norm that scales the generators of taylor2, exact and random."),
    ] = "frobenius"
    generators: Annotated[
        int, Meta(description="Rotation parameters of a chunk (m) for each of K and V, and group.", ge=1)
    ] = 1
    clip: Annotated[float, Meta(description="Bound on the rotation parameter, |theta| <= clip.", ge=0)] = 0.5
    theta: Annotated[
        Literal["chunk", "previous", "first"],
        Meta(description="What a chunk's theta is made of: its mean, that of the chunk before, its first token."),
    ] = "chunk"
    own: Annotated[
        Literal["exact", "projected"],
        Meta(description="What a chunk attends to within itself: its own K and V, or what the subspace keeps of them."),
    ] = "exact"
    dense_last_layers: Annotated[int, Meta(description="Last layers that send K and V uncompressed.", ge=0)] = 1
    remote_last_layers: Annotated[
        int,
        Meta(description="Last layers that see other chunks; all before them see only their own. 0: all do.", ge=0),
    ] = 0
    format: Annotated[FormatName, Meta(description="How payloads, and their gradients, cross the wire.")] = "float32"
    dense_format: Annotated[
        Literal["same", FormatName],
        Meta(description="The same where K and V are sent whole: warm start, last layers, unplugged; same: as format."),
    ] = "same"
    warmup_steps: Annotated[int, Meta(description="Uncompressed steps before the basis is taken.", ge=0)] = 50
    warmup_share: Annotated[float, Meta(description="Share of the context length used in those steps.", gt=0, le=1)] = (
        0.25
    )
    calibration_batches: Annotated[
        int, Meta(description="Batches from which the activations' second moments are taken.", ge=1)
    ] = 4
    refresh_every: Annotated[
        int, Meta(description="Steps between refreshes of the basis; 0 freezes it after the warm start.", ge=0)
    ] = 0
    refresh_decay: Annotated[
        float, Meta(description="Weight at a refresh of the moments that the one before it used.", ge=0, lt=1)
    ] = 0.5
    unplug_step: Annotated[
        int, Meta(description="Last step that compresses: after it K and V are sent whole; 0 is never.", ge=0)
    ] = 0
    unplug_lr_share: Annotated[
        float,
        Meta(
            description="Share of train.lr from which it falls after unplugging, at most; 1: the schedule goes on.",
            gt=0,
            le=1,
        ),
    ] = 1.0

    def check(self, path: str) -> None:
        turns = f"{path}rotation = {self.rotation!r}"
        if self.generators > 1 and self.rotation in ("fixed", "exact"):
            why = "does not turn" if self.rotation == "fixed" else "has a short form for one generator only"
            raise ConfigError(f"{path}generators = {self.generators}: expected 1, since {turns} {why}")
        if self.subspace == "learned" and (self.rotation != "fixed" or self.refresh_every):
            key, wanted = ("refresh_every", "0") if self.rotation == "fixed" else ("rotation", '"fixed"')
            raise ConfigError(
                f'{path}{key} = {getattr(self, key)!r}: expected {wanted}, since {path}subspace = "learned" is trained '
                f"on from the basis of the warm start"
            )
        if self.theta != "chunk" and not self.learns_theta:
            raise ConfigError(f'{path}theta = {self.theta!r}: expected "chunk", since {turns} has no theta of the data')
        if self.rotation == "exact" and self.clip > EXACT_CLIP:
            raise ConfigError(
                f"{path}clip = {self.clip}: expected at most {EXACT_CLIP}, since beyond it the series of {turns} loses "
                f'digits of float32; "geodesic" is exact for any angle'
            )

    @property
    def learns_theta(self) -> bool:
        """Whether theta comes from the data, not from the seed."""
        return self.rotation not in ("fixed", "random")
