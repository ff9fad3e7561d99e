"""The whole configuration tree: what the sections are together, and what follows from several of them.

`Config` joins `[net]` (netem), `[coordinator]`, and the sections of this folder. It is read by `load_config`, saved
with every run, and nodes compare its digest when they join. The machinery (strictness, overrides, messages) is in
`netem.config`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from coordinator.assignment import Assignment, assign
from coordinator.config import SECRETS, CoordinatorConfig
from coordinator.records.folder import whole_file
from netem.config import Section, Tree, apply_overrides, convert, describe, dump_toml, load_toml, merge
from netem.errors import ConfigError
from netem.explain import show
from netem.profile import NetConfig
from node.config.compress import CompressConfig
from node.config.data import COPIES, COPIES_BACK, RECALL, RECALL_PARTS, DataConfig, is_folder
from node.config.model import ModelConfig
from node.config.presets import load_preset
from node.config.pretrained import with_folder
from node.config.run import RunConfig
from node.config.train import TrainConfig

CONFIGS = Path("configs")
"""The folder of configs that have a name, below the folder in which a command is started."""

TOKEN_VARIABLE = "ISTHMUS_TOKEN"
"""The environment variable that holds the run's secret, out of sight of `ps`."""

OPERATOR_VARIABLE = "ISTHMUS_OPERATOR"
"""The same for the operator's secret."""


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
        owners = self.coordinator
        mode = "contiguous" if owners.assignment == "auto" else owners.assignment
        assign(self.model.chunks, owners.nodes, mode, owners.chunks_per_node)
        if self.compress.remote_last_layers > self.model.layers:
            raise ConfigError(
                f"compress.remote_last_layers = {self.compress.remote_last_layers}: expected at most "
                f"model.layers = {self.model.layers}, or 0 for all"
            )
        if owners.shards > 1 and owners.keys:
            raise ConfigError(
                f"coordinator.keys = {owners.keys!r}: expected a token (ISTHMUS_TOKEN) where coordinator.shards = "
                f"{owners.shards}, since the processes of a site are started alike and each would need a key"
            )
        passes = owners.shards * self.train.micro_batches
        if owners.shards > 1 and self.train.batch % passes:
            raise ConfigError(
                f"train.batch = {self.train.batch}: expected a multiple of coordinator.shards × train.micro_batches = "
                f"{passes}, so that all processes of a site compute equally many contexts"
            )
        if self.train.sync_fragments > self.model.layers:
            raise ConfigError(
                f"train.sync_fragments = {self.train.sync_fragments}: expected at most model.layers = "
                f"{self.model.layers}, so that each fragment has a layer"
            )
        if self.data.corpus == RECALL and self.model.chunks < RECALL_PARTS:
            raise ConfigError(
                f"model.chunks = {self.model.chunks}: the recall probe asks for what lies a {RECALL_PARTS}th of the "
                f"context back and more; with data.corpus = {RECALL!r} expected at least {RECALL_PARTS}"
            )
        if self.data.corpus == COPIES and self.model.chunks < 2 * COPIES_BACK:
            raise ConfigError(
                f"model.chunks = {self.model.chunks}: the probe of copies asks for what lies a quarter of the context "
                f"back and more; with data.corpus = {COPIES!r} expected at least {2 * COPIES_BACK}"
            )
        if self.coordinator.relay == "always" and self.data.document_masking:
            raise ConfigError(
                'coordinator.relay = "always": expected "never" or "auto", since data.document_masking = true sends '
                "each reader rows of its own, which others do not have"
            )
        self._check_stages()
        if self.compress.mode == "subspace":
            self._check_compression()
        if self.run.device.startswith("cuda") and (self.model.head_size % 8 or self.model.head_size > 256):
            raise ConfigError(
                f"model.head_dim = {self.model.head_size}: fused attention on a GPU takes multiples of 8 up to 256"
            )

    def _check_stages(self) -> None:
        stages, passes = self.coordinator.stages, self.train.micro_batches
        if stages > self.model.layers:
            raise ConfigError(f"coordinator.stages = {stages}: expected at most model.layers = {self.model.layers}")
        if stages > 1 and self.model.tied:
            raise ConfigError(
                f"coordinator.stages = {stages}: expected 1, or model.tied = false, since the embedding is in the "
                "first stage and the head in the last"
            )
        if self.train.pipeline == "1f1b" and passes < stages:
            raise ConfigError(
                f"train.micro_batches = {passes}: expected at least coordinator.stages = {stages}, so that every stage "
                'has a pass to compute; or train.pipeline = "gpipe"'
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
        layers = self.model.layers
        if not compress.compressed_of(layers):
            key = "compress.remote_last_layers" if compress.remote_last_layers else "model.layers"
            raise ConfigError(
                f"compress.dense_last_layers = {compress.dense_last_layers}: leaves none of "
                f"{key} = {layers - compress.local_of(layers)} to compress"
            )
        if self.data.document_masking:
            self._check_documents()
        if compress.refresh_every % self.train.sync_every:
            raise ConfigError(
                f"compress.refresh_every = {compress.refresh_every}: expected a multiple of "
                f"train.sync_every = {self.train.sync_every}, so that a new basis meets agreed weights"
            )

    def _check_documents(self) -> None:
        """A theta is made of one document, of which the part of a chunk is sent that goes on in the next chunk."""
        compress, why = self.compress, "since data.document_masking = true makes a theta of one document's tokens only"
        if compress.theta == "previous":
            raise ConfigError(f'compress.theta = "previous": expected "chunk" or "first", {why}')
        if compress.own == "projected" and compress.learns_theta:
            raise ConfigError(
                f'compress.own = "projected": expected "exact", or compress.rotation = "fixed", {why}, and a chunk may '
                f"hold several documents"
            )

    def assignment(self) -> Assignment:
        """The first assignment of chunks to ranks. Raises `ConfigError` where it is still to be chosen ("auto")."""
        owners = self.coordinator
        return assign(self.model.chunks, owners.nodes, owners.assignment, owners.chunks_per_node)

    @property
    def local_layers(self) -> int:
        """How many layers, from the first, see no chunk but their own, and send nothing."""
        return self.compress.local_of(self.model.layers)

    @property
    def compressed(self) -> range:
        """The layers that compress what they send."""
        return self.compress.compressed_of(self.model.layers)

    @property
    def leaks(self) -> bool:
        """Whether early tokens of a chunk depend on later ones, through a theta that is a mean over the whole chunk."""
        compress = self.compress
        own_mean = compress.theta == "chunk" and compress.learns_theta and compress.clip > 0
        return compress.compresses and compress.own == "projected" and own_mean and self.model.chunk_tokens > 1

    def digest(self) -> str:
        """Digest of what must be equal on all nodes before they join. Where a node runs and how it is reached may
        differ. Who owns which chunk is the coordinator's word, which nodes compare when they begin a generation."""
        tree = to_tree(self)
        for key in ("outputs", "device", "threads", "trace", "profile", "tracker", "recompute"):
            tree["run"].pop(key)
        owners = ("assignment", "chunks_per_node", "node_speeds", "relay", "replan")
        for key in ("address", "token", "operator", "keys", *owners, "slow", "slow_factor", "slow_steps"):
            tree["coordinator"].pop(key)
        tree["data"].pop("cache", None)
        tree["data"].pop("document_tokens")
        # Each node may keep these folders elsewhere: the digests of the first barrier compare what is in them.
        tree["model"].pop("init")
        if is_folder(self.data.tokenizer):
            tree["data"].pop("tokenizer")
        return hashlib.blake2b(dump_toml(tree).encode(), digest_size=16).hexdigest()


def config_file(path: Path) -> Path:
    """The file that a command line means by CONFIG: the path itself, or that of a config in configs/, by its name.

    A single word without .toml is a name, unless there is a file called that. Raises `ConfigError` for an unknown name.
    """
    if path.suffix == ".toml" or len(path.parts) != 1 or path.is_file() or str(path) == "..":
        return path
    named = CONFIGS / f"{path}.toml"
    if not named.is_file():
        known = ", ".join(sorted(found.stem for found in CONFIGS.glob("*.toml"))) or "none here"
        raise ConfigError(f"{path}: no such config; configs/ has {known}; give one of them, or the path of a TOML file")
    return named


def load_config(path: Path | None, overrides: Sequence[str] = (), preset: str = "") -> Config:
    """Read a config and check all of it: the defaults, under the preset, under the file, under the command line.

    `path` may also be the name of a config in configs/ (`config_file`).

    A file may name its preset itself (`preset = "home"`); `preset` takes the place of that. A folder that `model.init`
    names gives the shape (`node.config.pretrained`).
    """
    tree = with_preset(load_toml(config_file(path)) if path else {}, preset)
    return convert(Config, with_folder(apply_overrides(tree, overrides, text_keys())))


def recorded_config(tree: Tree) -> Config:
    """The config that a run has recorded, for reading. The record has no secrets, so nothing may listen by it: the
    address of its coordinator is left out too."""
    coordinator = {key: value for key, value in tree.get("coordinator", {}).items() if key != "address"}
    return convert(Config, tree | {"coordinator": coordinator})


def with_preset(tree: Tree, preset: str = "") -> Tree:
    """`tree` laid over the preset called `preset`, or else over the one that it names itself."""
    own = tree.get("preset", "")
    tree = {key: value for key, value in tree.items() if key != "preset"}
    if not isinstance(own, str):
        raise ConfigError(f"preset = {show(own)}: expected the name of a preset, in quotes")
    if not preset and not own:
        return tree
    return merge((load_preset(preset) if preset else load_preset(own, "preset =")).tree, tree)


def text_keys() -> set[str]:
    """The settings that hold text, and whose numbers are text too (a run named 2024)."""
    return {key.path for key in describe(Config) if "text" in key.type_name.split(" or ")}


def to_tree(config: Section) -> Tree:
    """The config as plain nested values, every default resolved."""
    tree = msgspec.to_builtins(config)
    assert isinstance(tree, dict)
    return tree


def public_tree(config: Config) -> Tree:
    """The resolved config as plain nested values, without its secrets."""
    tree = to_tree(config)
    for key in SECRETS:
        section, _, name = key.partition(".")
        tree[section].pop(name)
    return tree


def public_toml(config: Config) -> str:
    """The resolved config as TOML, without its secrets."""
    return dump_toml(public_tree(config))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, without its secrets; whole or not at all. Raises `ConfigError` for a failing disk."""
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(public_toml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
