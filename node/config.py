"""The whole configuration tree, and the sections that the node floor owns.

`Config` joins what every component owns: `[net]` (netem), `[coordinator]`, `[data]`, and here `[run]`,
`[model]`, `[compress]` and `[train]`. It is loaded by `load_config`, saved with every run, and its digest is
what nodes compare when they join. The machinery (strictness, overrides, messages) is in `netem.config`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from coordinator.assignment import Assignment, assign
from coordinator.config import SECRETS, CoordinatorConfig
from netem.config import Section, Tree, apply_overrides, convert, describe, dump_toml, load_toml
from netem.errors import ConfigError
from netem.profile import NetConfig
from node.data.config import RECALL, RECALL_PARTS, DataConfig

TOKEN_VARIABLE = "ISTHMUS_TOKEN"
"""The environment variable that holds the run's secret, out of sight of `ps`."""


class RunConfig(Section, frozen=True, kw_only=True):
    """[run]: what the run is called, where it writes, what it computes on."""

    name: Annotated[str, Meta(description="Name of the run; its folder is outputs/NAME.", min_length=1)] = "run"
    outputs: Annotated[str, Meta(description="Folder that receives the folders of runs.")] = "outputs"
    seed: Annotated[int, Meta(description="Seed of weights, batches and rotations.", ge=0, le=(1 << 63) - 1)] = 0
    device: Annotated[str, Meta(description="cpu, cuda, or cuda:N. On cuda the compute runs in bf16.")] = "cpu"
    threads: Annotated[int, Meta(description="CPU threads of each node; 0 leaves it to torch.", ge=0)] = 0
    resume: Annotated[bool, Meta(description="Go on from the last complete checkpoint of outputs/NAME.")] = False

    def check(self, path: str) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"{path}device = {self.device!r}: expected cpu, cuda or cuda:N")
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable() or len(self.name) > 64:
            raise ConfigError(
                f"{path}name = {self.name!r}: expected a plain folder name, without slashes, of at most 64 characters"
            )

    @property
    def folder(self) -> Path:
        """Where everything of this run is written."""
        return Path(self.outputs) / self.name


class ModelConfig(Section, frozen=True, kw_only=True):
    """[model]: a Llama-3 decoder over a context that is cut into equal chunks."""

    layers: Annotated[int, Meta(description="Decoder layers.", ge=1)] = 4
    d_model: Annotated[int, Meta(description="Width of the residual stream.", ge=8)] = 128
    heads: Annotated[int, Meta(description="Query heads.", ge=1)] = 4
    kv_heads: Annotated[int, Meta(description="Key and value heads (grouped-query attention).", ge=1)] = 4
    head_dim: Annotated[int, Meta(description="Width of one head; 0 means d_model / heads.", ge=0)] = 0
    ffn_dim: Annotated[int, Meta(description="Inner width of the SwiGLU block.", ge=8)] = 384
    context: Annotated[int, Meta(description="Tokens in one context (T).", ge=2)] = 1024
    chunks: Annotated[int, Meta(description="Equal parts of the context (C), the unit of ownership.", ge=1)] = 4
    rope_theta: Annotated[float, Meta(description="Base of the rotary position embedding.", gt=0)] = 500_000.0
    norm_eps: Annotated[float, Meta(description="Epsilon of RMSNorm.", gt=0)] = 1e-5
    tied: Annotated[bool, Meta(description="Share the token embedding with the output head.")] = True

    def check(self, path: str) -> None:
        if self.context % self.chunks:
            lower = max(self.context // self.chunks, 1) * self.chunks
            raise ConfigError(
                f"{path}context = {self.context}: does not divide into {path}chunks = {self.chunks} equal parts; "
                f"{lower} or {lower + self.chunks} would"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"{path}heads = {self.heads}: expected a multiple of {path}kv_heads = {self.kv_heads}")
        if not self.head_dim and self.d_model % self.heads:
            raise ConfigError(
                f"{path}d_model = {self.d_model}: expected a multiple of {path}heads = {self.heads}, "
                f"or {path}head_dim set"
            )
        if self.head_size % 2:
            raise ConfigError(f"{path}head_dim = {self.head_size}: expected an even number (RoPE turns pairs)")

    @property
    def head_size(self) -> int:
        """head_dim, with its default filled in."""
        return self.head_dim or self.d_model // self.heads

    @property
    def d_kv(self) -> int:
        """Width of K, and of V, over all heads."""
        return self.kv_heads * self.head_size

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one chunk (n = T / C)."""
        return self.context // self.chunks


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


class TrainConfig(Section, frozen=True, kw_only=True):
    """[train]: optimizer, schedule, and how often things happen."""

    steps: Annotated[int, Meta(description="Optimizer steps, warm start included.", ge=1)] = 300
    batch: Annotated[int, Meta(description="Contexts in one step.", ge=1)] = 1
    lr: Annotated[float, Meta(description="Peak learning rate of AdamW.", gt=0)] = 3e-4
    lr_warmup_steps: Annotated[int, Meta(description="Steps of linear warm-up.", ge=0)] = 20
    lr_final_share: Annotated[float, Meta(description="Share of lr left at the last step.", ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Meta(description="AdamW weight decay (matrices only).", ge=0)] = 0.01
    beta1: Annotated[float, Meta(ge=0, lt=1, description="AdamW beta1.")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="AdamW beta2.")] = 0.95
    grad_clip: Annotated[float, Meta(description="Bound on the gradient's global norm; 0 is none.", ge=0)] = 1.0
    sync_every: Annotated[
        int,
        Meta(description="Steps between averagings (c). 1 averages gradients: exact context parallelism.", ge=1),
    ] = 20
    outer_lr: Annotated[
        float, Meta(description="Rate of the outer step at an averaging of weights; 1 is their mean.", gt=0)
    ] = 1.0
    outer_momentum: Annotated[float, Meta(description="Nesterov momentum of the outer step.", ge=0, lt=1)] = 0.0
    checkpoint_every: Annotated[int, Meta(description="Steps between checkpoints; 0 is only at the end.", ge=0)] = 0
    eval_every: Annotated[
        int, Meta(description="Steps between held-out evaluations; 0 is only at start and end.", ge=0)
    ] = 0
    eval_batches: Annotated[int, Meta(description="Held-out batches of one evaluation.", ge=1)] = 8

    def check(self, path: str) -> None:
        if self.checkpoint_every % self.sync_every:
            raise ConfigError(
                f"{path}checkpoint_every = {self.checkpoint_every}: expected a multiple of "
                f"{path}sync_every = {self.sync_every}, so that a checkpoint holds agreed weights"
            )
        if self.eval_every % self.sync_every:
            raise ConfigError(
                f"{path}eval_every = {self.eval_every}: expected a multiple of "
                f"{path}sync_every = {self.sync_every}, so that agreed weights are evaluated"
            )
        for key, plain in (("outer_lr", 1.0), ("outer_momentum", 0.0)):
            if self.sync_every == 1 and getattr(self, key) != plain:
                raise ConfigError(
                    f"{path}{key} = {getattr(self, key)}: expected {plain}, since {path}sync_every = 1 averages "
                    f"gradients, and the outer step is taken where weights are averaged"
                )


class Config(Section, frozen=True, kw_only=True):
    """Everything that a run depends on."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    compress: CompressConfig = CompressConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    net: NetConfig = NetConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()

    def check(self, path: str) -> None:
        self.assignment()
        if self.compress.remote_last_layers > self.model.layers:
            raise ConfigError(
                f"compress.remote_last_layers = {self.compress.remote_last_layers}: expected at most "
                f"model.layers = {self.model.layers}, or 0 for all"
            )
        if self.data.corpus == RECALL and self.model.chunks < RECALL_PARTS:
            raise ConfigError(
                f"model.chunks = {self.model.chunks}: the recall probe asks for what lies a {RECALL_PARTS}th of the "
                f"context back and more; with data.corpus = {RECALL!r} expected at least {RECALL_PARTS}"
            )
        if self.compress.mode == "subspace":
            self._check_compression()
        if self.run.device.startswith("cuda") and (self.model.head_size % 8 or self.model.head_size > 256):
            raise ConfigError(
                f"model.head_dim = {self.model.head_size}: fused attention on a GPU takes multiples of 8 up to 256"
            )

    def _check_compression(self) -> None:
        compress, steps = self.compress, self.train.steps
        if compress.warmup_steps >= steps:
            raise ConfigError(
                f"compress.warmup_steps = {compress.warmup_steps}: expected fewer than "
                f'train.steps = {steps}, or compress.mode = "dense"'
            )
        if compress.unplug_step and not compress.warmup_steps < compress.unplug_step < steps:
            raise ConfigError(
                f"compress.unplug_step = {compress.unplug_step}: expected more than compress.warmup_steps = "
                f"{compress.warmup_steps} and less than train.steps = {steps}, or 0 for never"
            )
        if not self.compressed_layers:
            key = "compress.remote_last_layers" if compress.remote_last_layers else "model.layers"
            raise ConfigError(
                f"compress.dense_last_layers = {compress.dense_last_layers}: leaves none of "
                f"{key} = {self.model.layers - self.local_layers} to compress"
            )
        if compress.refresh_every % self.train.sync_every:
            raise ConfigError(
                f"compress.refresh_every = {compress.refresh_every}: expected a multiple of "
                f"train.sync_every = {self.train.sync_every}, so that a new basis meets agreed weights"
            )

    def assignment(self) -> Assignment:
        """The first assignment of chunks to ranks. Raises `ConfigError` where it does not come out."""
        owners = self.coordinator
        return assign(self.model.chunks, owners.nodes, owners.assignment, owners.chunks_per_node)

    @property
    def local_layers(self) -> int:
        """How many layers, from the first, see no chunk but their own, and send nothing."""
        layers = self.model.layers
        return layers if self.compress.mode == "local" else layers - (self.compress.remote_last_layers or layers)

    @property
    def compressed(self) -> range:
        """The layers that compress what they send."""
        end = self.model.layers - self.compress.dense_last_layers
        return range(self.local_layers, end) if self.compress.mode == "subspace" else range(0)

    @property
    def compressed_layers(self) -> int:
        """How many layers compress what they send."""
        return len(self.compressed)

    def is_unplugged_at(self, step: int) -> bool:
        """Whether `step` trains, and its checkpoint is, a model that was compressed once and is not any more: without
        theta and bases, a plain decoder that sends K and V whole."""
        return self.compressed_layers > 0 and 0 < self.compress.unplug_step < step

    @property
    def hands_theta_on(self) -> bool:
        """Whether the owner of a chunk sends its theta to the owner of the next."""
        return self.compressed_layers > 0 and self.compress.theta == "previous"

    @property
    def leaks(self) -> bool:
        """Whether early tokens of a chunk learn of later ones: a mean over all of it turns what they attend to."""
        compress = self.compress
        own_mean = compress.theta == "chunk" and compress.learns_theta and compress.clip > 0
        return compress.mode == "subspace" and compress.own == "projected" and own_mean and self.model.chunk_tokens > 1

    @property
    def warmup_steps(self) -> int:
        """Steps before compression starts: none unless the mode compresses."""
        return self.compress.warmup_steps if self.compress.mode == "subspace" else 0

    @property
    def warmup_chunk_tokens(self) -> int:
        """Tokens in a chunk during the warm start: the chunks stay as many, and become shorter."""
        return max(1, round(self.model.chunk_tokens * self.compress.warmup_share))

    def digest(self) -> str:
        """Digest of what must be equal on all nodes. Where a node runs and how it is reached may differ."""
        tree = to_tree(self)
        for key in ("outputs", "device", "threads"):
            tree["run"].pop(key)
        tree["coordinator"].pop("address")
        tree["coordinator"].pop("token")
        tree["data"].pop("cache", None)
        return hashlib.blake2b(dump_toml(tree).encode(), digest_size=16).hexdigest()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (or the defaults), lay the command line's overrides over it, and check all of it."""
    tree = load_toml(path) if path else {}
    texts = {key.path for key in describe(Config) if "str" in key.type_name.split(" | ")}
    return convert(Config, apply_overrides(tree, overrides, texts))


def to_tree(config: Section) -> Tree:
    """The config as plain nested values, every default resolved."""
    tree = msgspec.to_builtins(config)
    assert isinstance(tree, dict)
    return tree


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, without its secrets."""
    tree = to_tree(config)
    for key in SECRETS:
        section, _, name = key.partition(".")
        tree[section].pop(name)
    path.write_text(dump_toml(tree), encoding="utf-8")
