"""[compress]: what crosses the network in place of K and V (the paper's section 4)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta

from netem.config import Section
from netem.errors import ConfigError

EXACT_CLIP = 3.0
"""The largest angle for `exact`: beyond it, the terms of its series are more than e³ = 20 times their sum."""

RingName = Literal["float32", "bfloat16", "int8", "fp8", "int4", "topk10"]
"""Formats in which weights may be averaged: what is sent and sent again stays as it is."""
ScaledName = Literal[RingName, "int2"]
"""The number formats that take numbers of any size."""
UnitName = Literal["unit4"]
"""Formats without scales, for numbers whose mean square is about 1."""
FormatName = Literal[ScaledName, UnitName]
"""The number formats of the wire; `node.exchange.formats` implements them."""


class CompressConfig(Section, frozen=True, kw_only=True):
    """[compress]: what crosses the network in place of K and V (the paper's section 4)."""

    mode: Annotated[
        Literal["subspace", "dense", "local"],
        Meta(
            description="subspace: K and V are sent compressed; dense: they are sent whole; local: nothing is sent, "
            "and each chunk attends only to itself."
        ),
    ] = "subspace"
    k_share: Annotated[
        float, Meta(description="Share of K's width that is not sent; the rank is the rest of it.", ge=0, lt=1)
    ] = 0.98
    v_share: Annotated[
        float, Meta(description="Share of V's width that is not sent; the rank is the rest of it.", ge=0, lt=1)
    ] = 0.95
    last_k_share: Annotated[
        float,
        Meta(description="k_share of the last layer, which is compressed only if dense_last_layers is 0.", ge=0, lt=1),
    ] = 0.9
    last_v_share: Annotated[
        float,
        Meta(description="v_share of the last layer, which is compressed only if dense_last_layers is 0.", ge=0, lt=1),
    ] = 0.8
    budget_bytes_per_token: Annotated[
        float,
        Meta(
            description="Send at most this many bytes per token to each reader, over all compressed layers; ranks are "
            "then chosen after the warm start, where they keep most of the energy of K and V. 0: use the shares above.",
            ge=0,
        ),
    ] = 0.0
    scope: Annotated[
        Literal["layer", "head"],
        Meta(description="layer: one subspace over all heads of a layer; head: one for each head."),
    ] = "layer"
    basis: Annotated[
        Literal["activations", "weights"],
        Meta(
            description="Source of the basis. activations: principal directions of K and V; weights: those of the "
            "matrices that make them."
        ),
    ] = "activations"
    subspace: Annotated[
        Literal["frozen", "learned"],
        Meta(
            description="frozen: the basis stays as it was taken (the paper); learned: it is trained further, which "
            'needs rotation = "fixed".'
        ),
    ] = "frozen"
    centred: Annotated[
        bool,
        Meta(
            description="Send K and V without their means, which all nodes know from when the basis is taken; needs "
            'subspace = "learned".'
        ),
    ] = False
    whitened: Annotated[
        bool,
        Meta(
            description="Divide each number of a payload by its root mean square when the basis is taken, so that weak "
            "directions are rounded as finely as strong ones; needs centred."
        ),
    ] = False
    rotation: Annotated[
        Literal["geodesic", "taylor2", "exact", "fixed", "random"],
        Meta(
            description="How a chunk turns the shared basis by its theta. geodesic: exactly, towards the next "
            "principal directions; taylor2 and exact: by a random generator, to second order or by the full "
            "exponential; random: as taylor2, with angles from the seed; fixed: not at all."
        ),
    ] = "geodesic"
    generator_norm: Annotated[
        Literal["frobenius", "spectral"],
        Meta(description="Norm by which the random generators of taylor2, exact and random are scaled."),
    ] = "frobenius"
    generators: Annotated[
        int,
        Meta(
            description="Number of rotation parameters (m) in the theta of each chunk, for each of K and V and each "
            "subspace.",
            ge=1,
        ),
    ] = 1
    clip: Annotated[
        float, Meta(description="Upper bound on the size of each rotation parameter, |theta| <= clip.", ge=0)
    ] = 0.5
    theta: Annotated[
        Literal["chunk", "previous", "first"],
        Meta(
            description="What theta is computed from. chunk: the chunk's mean; previous: the mean of the chunk "
            "before; first: the chunk's first token."
        ),
    ] = "chunk"
    own: Annotated[
        Literal["exact", "projected"],
        Meta(
            description="What a chunk attends to within itself. exact: its own K and V; projected: what the subspace "
            "keeps of them."
        ),
    ] = "exact"
    dense_last_layers: Annotated[int, Meta(description="Number of last layers that send K and V whole.", ge=0)] = 0
    remote_last_layers: Annotated[
        int,
        Meta(
            description="Number of last layers that attend to other chunks; the layers before them attend only within "
            "a chunk. 0: all layers do.",
            ge=0,
        ),
    ] = 0
    format: Annotated[FormatName, Meta(description="Number format in which compressed K and V are sent.")] = "bfloat16"
    grad_format: Annotated[
        Literal["same", ScaledName],
        Meta(description="Number format in which the gradients of all payloads return. same: as the payload went."),
    ] = "same"
    dense_format: Annotated[
        Literal["same", ScaledName],
        Meta(
            description="Number format where K and V are sent whole: in the warm start, in dense last layers, after "
            "unplugging. same: as format."
        ),
    ] = "same"
    warmup_steps: Annotated[
        int,
        Meta(description="Uncompressed steps at the beginning (the warm start), after which the basis is taken.", ge=0),
    ] = 50
    warmup_share: Annotated[
        float, Meta(description="Share of the context length that is used in the warm start.", gt=0, le=1)
    ] = 0.25
    calibration_batches: Annotated[
        int,
        Meta(description="Number of batches from which the second moments of K and V are taken for the basis.", ge=1),
    ] = 4
    refresh_every: Annotated[
        int, Meta(description="Steps between refreshes of the basis. 0: it stays as it was after the warm start.", ge=0)
    ] = 0
    refresh_decay: Annotated[
        float, Meta(description="Weight that the moments of the previous refresh keep at the next one.", ge=0, lt=1)
    ] = 0.5
    unplug_step: Annotated[
        int,
        Meta(
            description="Last step that compresses; after it, K and V are sent whole (unplugged). 0: compress to the "
            "end.",
            ge=0,
        ),
    ] = 0
    unplug_lr_share: Annotated[
        float,
        Meta(
            description="Upper bound on the learning rate after unplugging, as a share of train.lr; 1 keeps the "
            "schedule.",
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
                f'{path}{key} = {getattr(self, key)!r}: expected {wanted}, since {path}subspace = "learned" trains '
                f"the basis of the warm start further"
            )
        self._check_units(path)
        if self.theta != "chunk" and not self.learns_theta:
            raise ConfigError(
                f'{path}theta = {self.theta!r}: expected "chunk", since {turns} takes no theta from the data'
            )
        if self.rotation == "exact" and self.clip > EXACT_CLIP:
            raise ConfigError(
                f"{path}clip = {self.clip}: expected at most {EXACT_CLIP}, since beyond it the series of {turns} loses "
                f'digits of float32; "geodesic" is exact for any angle'
            )

    def _check_units(self, path: str) -> None:
        if self.centred:
            for key, wanted in (("subspace", "learned"), ("basis", "activations"), ("own", "exact")):
                if (found := getattr(self, key)) != wanted:
                    raise ConfigError(f'{path}{key} = {found!r}: expected "{wanted}", since {path}centred is set')
        if self.whitened and not self.centred:
            raise ConfigError(f"{path}centred = false: expected true, since {path}whitened is set")
        if self.format not in get_args(UnitName):
            return
        if not self.whitened:
            raise ConfigError(
                f"{path}format = {self.format!r}: sends numbers without a scale, which have to be of size 1; set "
                f"{path}whitened = true"
            )
        for key in ("dense_format", "grad_format"):
            if getattr(self, key) == "same":
                raise ConfigError(
                    f'{path}{key} = "same": expected a format with scales, such as "int4", since {path}format = '
                    f"{self.format!r} has none"
                )

    @property
    def learns_theta(self) -> bool:
        """Whether theta comes from the data, not from the seed."""
        return self.rotation not in ("fixed", "random")

    @property
    def compresses(self) -> bool:
        """Whether there are layers that compress what they send. `Config` refuses a subspace mode without any."""
        return self.mode == "subspace"

    def local_of(self, layers: int) -> int:
        """How many of a model's layers, from the first, see no chunk but their own, and send nothing."""
        return layers if self.mode == "local" else layers - (self.remote_last_layers or layers)

    def compressed_of(self, layers: int) -> range:
        """Those of a model's layers that compress what they send."""
        return range(self.local_of(layers), layers - self.dense_last_layers) if self.compresses else range(0)

    @property
    def hands_theta_on(self) -> bool:
        """Whether the owner of a chunk sends its theta to the owner of the next."""
        return self.compresses and self.theta == "previous"

    @property
    def warm_start_steps(self) -> int:
        """Steps before compression starts: none unless the mode compresses."""
        return self.warmup_steps if self.compresses else 0

    def warm_start_tokens(self, chunk_tokens: int) -> int:
        """Tokens in a chunk during the warm start: the chunks stay as many, and become shorter."""
        return max(1, round(chunk_tokens * self.warmup_share))

    def is_unplugged_at(self, step: int) -> bool:
        """Whether compression was taken off before `step`: from then on the model is a plain decoder without theta and
        bases, which sends K and V whole."""
        return self.compresses and 0 < self.unplug_step < step
