"""The whole config: one line for each mistake, overrides, and the digest that nodes compare."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from netem.config import Tree, convert, describe, load_toml
from netem.errors import ConfigError
from node.config import Config, load_config, save_config, to_tree

TOKEN = "--coordinator.token=secret"  # that a coordinator reachable from elsewhere needs; never in a file


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_that_ships_loads(path: Path) -> None:
    config = load_config(path, [TOKEN])
    assert config.assignment().n_chunks == config.model.chunks
    assert "token" not in load_toml(path).get("coordinator", {})


def test_the_paper_models_are_those_of_the_paper() -> None:
    for name, layers in (("paper-800m", 8), ("paper-3b", 32)):
        config = load_config(ROOT / "configs" / f"{name}.toml", [TOKEN])
        model, compress = config.model, config.compress
        assert (model.layers, model.d_model, model.heads, model.context) == (layers, 2048, 8, 131072)
        assert (compress.k_share, compress.v_share, compress.warmup_steps) == (0.98, 0.95, 500)
        assert (compress.mode, compress.dense_last_layers, config.train.sync_every) == ("subspace", 1, 200)
    layout = config.coordinator.layout
    assert (layout.sites, layout.stages, layout.processes) == (8, 4, 32)


SUBSPACE = {
    "mode": "subspace",
    "subspace": "frozen",
    "rotation": "geodesic",
    "warmup_steps": 50,
    "dense_last_layers": 1,
}
"""Stated where a test depends on them, so that the defaults may change."""

TWO = {"batch": 2, "micro_batches": 2}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"run": {"device": "gpu"}}, "run.device = 'gpu': expected cpu, cuda or cuda:N"),
    ({"run": {"device": "cuda:x"}}, "run.device = 'cuda:x': expected cpu, cuda or cuda:N"),
    ({"run": {"device": "cpu:1"}}, "run.device = 'cpu:1': expected cpu, cuda or cuda:N"),
    ({"run": {"device": "cuda:"}}, "run.device = 'cuda:': expected cpu, cuda or cuda:N"),
    ({"run": {"name": "a/b"}}, "run.name = 'a/b': expected a plain folder name"),
    ({"run": {"name": ".."}}, "run.name = '..': expected a plain folder name"),
    ({"run": {"name": ""}}, 'run.name = "": expected text that is not empty'),
    (
        {"run": {"trace": "40-42"}},
        "run.trace = '40-42': expected a step or a range of at most 100 steps, such as 40 or",
    ),
    ({"run": {"trace": "42..40"}}, "run.trace = '42..40': expected a step or a range"),
    ({"run": {"trace": "0"}}, "run.trace = '0': expected a step or a range"),
    ({"run": {"trace": "1..101"}}, "run.trace = '1..101': expected a step or a range of at most 100 steps"),
    ({"run": {"seed": -1}}, "run.seed = -1: expected a whole number of at least 0"),
    (
        {"model": {"context": 1000, "chunks": 3}},
        "model.context = 1000: does not divide into model.chunks = 3 equal parts; 999 or 1002 would",
    ),
    (
        {"model": {"context": 2, "chunks": 3}},
        "model.context = 2: does not divide into model.chunks = 3 equal parts; 3 or 6 would",
    ),
    ({"model": {"heads": 4, "kv_heads": 3}}, "model.heads = 4: expected a multiple of model.kv_heads = 3"),
    ({"model": {"d_model": 130}}, "model.d_model = 130: expected a multiple of model.heads = 4, or model.head_dim set"),
    ({"model": {"head_dim": 7}}, "model.head_dim = 7: expected an even number"),
    ({"model": {"d_model": 36}}, "model.head_dim = 9: expected an even number"),
    ({"model": {"layers": 0}}, "model.layers = 0: expected a whole number of at least 1"),
    ({"model": {"tied": 1}}, "model.tied = 1: expected true or false, not a whole number"),
    ({"model": {"layer": 3}}, "model.layer = 3: unknown key; did you mean layers?"),
    ({"compress": {"k_share": 1.0}}, "compress.k_share = 1.0: expected a number below 1"),
    ({"compress": {"mode": "sparse"}}, "compress.mode = \"sparse\": expected one of 'subspace', 'dense', 'local'"),
    ({"compress": {"rotation": "cayley"}}, "compress.rotation = \"cayley\": expected one of 'geodesic', 'taylor2'"),
    ({"compress": {"warmup_share": 0.0}}, "compress.warmup_share = 0.0: expected a number above 0"),
    (
        {"compress": SUBSPACE | {"warmup_steps": 300}},
        "compress.warmup_steps = 300: expected fewer than train.steps = 300",
    ),
    (
        {"compress": SUBSPACE | {"dense_last_layers": 4}},
        "compress.dense_last_layers = 4: leaves none of model.layers = 4",
    ),
    (
        {"compress": SUBSPACE | {"remote_last_layers": 1}},
        "compress.dense_last_layers = 1: leaves none of compress.remote_last_layers = 1 to compress",
    ),
    ({"compress": {"remote_last_layers": 5}}, "compress.remote_last_layers = 5: expected at most model.layers = 4"),
    (
        {"compress": SUBSPACE | {"unplug_step": 50}},
        "compress.unplug_step = 50: expected more than compress.warmup_steps = 50 and less than train.steps = 300",
    ),
    (
        {"compress": SUBSPACE | {"unplug_step": 300}},
        "compress.unplug_step = 300: expected more than compress.warmup_steps = 50",
    ),
    ({"compress": {"unplug_lr_share": 0.0}}, "compress.unplug_lr_share = 0.0: expected a number above 0"),
    (
        {"compress": SUBSPACE | {"theta": "previous"}, "data": {"document_masking": True}},
        'compress.theta = "previous": expected "chunk" or "first", since data.document_masking = true',
    ),
    (
        {"compress": SUBSPACE | {"own": "projected"}, "data": {"document_masking": True}},
        'compress.own = "projected": expected "exact", or compress.rotation = "fixed", since data.document_masking',
    ),
    ({"compress": SUBSPACE | {"generators": 2, "rotation": "fixed"}}, "compress.generators = 2: expected 1, since"),
    (
        {"compress": SUBSPACE | {"generators": 2, "rotation": "exact"}},
        "compress.rotation = 'exact' has a short form for one",
    ),
    (
        {"compress": SUBSPACE | {"theta": "previous", "rotation": "random"}},
        "compress.theta = 'previous': expected \"chunk\"",
    ),
    ({"compress": SUBSPACE | {"clip": 3.5, "rotation": "exact"}}, "compress.clip = 3.5: expected at most 3.0"),
    (
        {"compress": SUBSPACE | {"refresh_every": 30}},
        "compress.refresh_every = 30: expected a multiple of train.sync_every = 20",
    ),
    ({"compress": {"refresh_decay": 1.0}}, "compress.refresh_decay = 1.0: expected a number below 1"),
    ({"train": {"lr": 0.0}}, "train.lr = 0.0: expected a number above 0"),
    ({"train": {"lr": "fast"}}, 'train.lr = "fast": expected a number, not text'),
    ({"train": {"beta2": 1.0}}, "train.beta2 = 1.0: expected a number below 1"),
    (
        {"train": {"checkpoint_every": 30}},
        "train.checkpoint_every = 30: expected a multiple of train.sync_every = 20",
    ),
    ({"coordinator": {"nodes": 5}}, "coordinator.nodes = 5: more nodes than chunks (4)"),
    (
        {"coordinator": {"shards": 2}, "train": {"batch": 6, "micro_batches": 2}},
        "train.batch = 6: expected a multiple of coordinator.shards × train.micro_batches = 4",
    ),
    (
        {"coordinator": {"nodes": 2, "chunks_per_node": [3, 2]}},
        "coordinator.chunks_per_node = [3, 2]: expected 2 counts of at least 1 that sum to the 4 chunks",
    ),
    ({"train": {"pipeline": "zb"}}, "train.pipeline = \"zb\": expected one of '1f1b', 'gpipe'"),
    (
        {"coordinator": {"stages": 5}, "model": {"tied": False}},
        "coordinator.stages = 5: expected at most model.layers = 4",
    ),
    (
        {"coordinator": {"stages": 2}, "train": TWO},
        "coordinator.stages = 2: expected 1, or model.tied = false, since the embedding",
    ),
    (
        {"coordinator": {"stages": 3}, "train": TWO, "model": {"tied": False}},
        "train.micro_batches = 2: expected at least coordinator.stages = 3, so that every stage has a pass to compute;",
    ),
    ({"data": {"corpus": "novel"}}, "data.corpus = 'novel': expected novels"),
    ({"trian": {"steps": 5}}, "trian: unknown key; did you mean train?"),
    ({"train": 5}, "train = 5: expected a table of settings, not a whole number"),
]


@pytest.mark.parametrize(("tree", "message"), MISTAKES, ids=[message.partition(":")[0] for _, message in MISTAKES])
def test_a_mistake_is_one_line_with_key_value_and_expectation(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(Config, tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mode_that_does_not_compress_has_no_warm_start_to_be_wrong_about() -> None:
    for mode in ("dense", "local"):
        never = {"mode": mode, "warmup_steps": 999, "dense_last_layers": 99, "unplug_step": 10}
        config = convert(Config, {"compress": never})
        assert (len(config.compressed), config.compress.warm_start_steps, config.compress.is_unplugged_at(11)) == (
            0,
            0,
            False,
        )


@pytest.mark.parametrize(
    ("compress", "local_layers", "compressed"),
    [
        ({}, 0, [0, 1, 2]),
        ({"dense_last_layers": 0}, 0, [0, 1, 2, 3]),
        ({"remote_last_layers": 2}, 2, [2]),
        ({"remote_last_layers": 1, "dense_last_layers": 0}, 3, [3]),
        ({"remote_last_layers": 4}, 0, [0, 1, 2]),
        ({"mode": "dense"}, 0, []),
        ({"mode": "dense", "remote_last_layers": 1}, 3, []),
        ({"mode": "local"}, 4, []),
        ({"mode": "local", "remote_last_layers": 1}, 4, []),
    ],
    ids=str,
)
def test_which_layers_see_other_chunks_and_which_compress(
    compress: dict[str, Any], local_layers: int, compressed: list[int]
) -> None:
    config = convert(Config, {"compress": SUBSPACE | compress})
    assert (
        config.local_layers,
        list(config.compressed),
    ) == (local_layers, compressed)
    assert len(config.compressed) == len(compressed)


def test_what_follows_from_the_settings() -> None:
    model = {"d_model": 96, "heads": 6, "kv_heads": 2, "context": 48, "chunks": 4}
    config = convert(Config, {"model": model, "compress": SUBSPACE | {"warmup_share": 0.25}})
    assert (config.model.head_size, config.model.d_kv, config.model.chunk_tokens) == (16, 32, 12)
    assert len(config.compressed) == 3
    assert config.compress.warm_start_tokens(config.model.chunk_tokens) == 3
    assert convert(Config, {"model": {"d_model": 96, "head_dim": 8}}).model.head_size == 8
    assert convert(Config, {"compress": {"warmup_share": 1e-9}}).compress.warm_start_tokens(12) == 1
    assert config.run.folder == Path("outputs/run")


def test_the_command_line_is_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[train]\nsteps = 100\nbatch = 2\n[model]\nlayers = 2\n")
    config = load_config(path, ["--train.steps", "200", "--model.tied=false", "--compress.mode", "dense"])
    assert (config.train.steps, config.train.batch, config.model.layers) == (200, 2, 2)
    assert (config.model.tied, config.compress.mode) == (False, "dense")
    assert load_config(
        None, ["--coordinator.nodes", "2", "--coordinator.chunks_per_node", "[3, 1]"]
    ).assignment().to_lists() == [[0, 1, 2], [3]]
    with pytest.raises(ConfigError, match=r"train\.stepz = 3: unknown key; did you mean steps\?"):
        load_config(path, ["--train.stepz", "3"])
    with pytest.raises(ConfigError, match=r"--train\.steps: a value is missing"):
        load_config(path, ["--train.steps"])


def test_a_saved_config_is_the_same_without_its_secrets(tmp_path: Path) -> None:
    config = load_config(None, [TOKEN, "--train.lr", "1e-3", "--coordinator.nodes", "4"])
    save_config(config, tmp_path / "config.toml")
    assert "secret" not in (tmp_path / "config.toml").read_text()
    assert load_config(tmp_path / "config.toml", [TOKEN]) == config


LOCAL = {
    "run.outputs": "elsewhere",
    "run.device": "cuda:1",
    "run.threads": 3,
    "run.trace": "40..42",
    "run.profile": "40..42",
    "run.tracker": "wandb",
    "run.recompute": True,
    "coordinator.address": "tcp://127.0.0.1:7070",
    "coordinator.token": "secret",
    "coordinator.operator": "boss",
    "coordinator.keys": "keys/node-0.toml",
    "coordinator.assignment": "zigzag",
    "coordinator.node_speeds": [1.0, 1.0, 0.5, 0.5],
    "coordinator.replan": "plan",
    "coordinator.slow": "unload",
    "coordinator.slow_factor": 3.0,
    "coordinator.slow_steps": 5,
    "coordinator.relay": "always",
    "model.init": "./llama",
    "data.cache": "/elsewhere",
}
"""Where a node runs, how it is reached, and what the coordinator tells it: may differ from node to node."""

OTHER: dict[str, Any] = {
    "model.head_dim": 16,
    "model.rope_scaling.factor": 2.0,
    "model.d_model": 256,
    "model.context": 2048,
    "model.chunks": 8,
    "model.heads": 8,
    "model.kv_heads": 2,
    "coordinator.nodes": 2,
    "data.corpus": "./text",
    "data.tokenizer": "bytes",
    "net.profile": "unshaped",
    "train.checkpoint_every": 40,
    "train.eval_every": 40,
    "compress.refresh_every": 40,
    "compress.budget_bytes_per_token": 64.0,
    "compress.remote_last_layers": 2,
    "compress.unplug_step": 200,
}


def other_value(key: str, current: Any) -> Any:
    """A legal value of `key` that is not its default."""
    if key in LOCAL or key in OTHER:
        return (LOCAL | OTHER)[key]
    choices = {"compress.mode": "local", "compress.scope": "head", "compress.basis": "weights"}
    choices |= {"compress.rotation": "random", "compress.generator_norm": "spectral"}
    choices |= {"compress.format": "int8", "compress.dense_format": "int4", "compress.grad_format": "int8"}
    choices |= {"compress.theta": "first", "compress.own": "projected", "train.nonfinite": "skip"}
    choices |= {"train.sync_format": "fp8", "coordinator.encryption": "always", "train.pipeline": "gpipe"}
    if key in choices:
        return choices[key]
    if isinstance(current, bool):
        return not current
    if isinstance(current, int):
        return current + 1
    return current / 2 or 0.5 if isinstance(current, float) else f"{current}x"


def keys() -> list[str]:
    """Settings that may be changed alone; those that want another to go with them have a test of their own."""
    every = [key.path for key in describe(Config)]
    not_alone = (
        *("coordinator.chunks_per_node", "compress.subspace", "compress.centred", "compress.whitened"),
        *("data.document_tokens", "coordinator.stages"),
    )
    return [key for key in every if key not in not_alone and (key[:4] != "net." or key == "net.profile")]


@pytest.mark.parametrize("key", keys())
def test_the_digest_tells_every_setting_but_those_of_one_node(key: str) -> None:
    *sections, name = key.split(".")
    net = {"profile": "internet-300mbps"}
    plain = convert(Config, {"coordinator": {"nodes": 4}, "net": net, "compress": SUBSPACE, "train": {"batch": 2}})
    tree = to_tree(plain)
    section = functools.reduce(dict.__getitem__, sections, tree)
    section[name] = other_value(key, section[name])
    changed = convert(Config, tree)
    assert changed != plain
    assert (changed.digest() == plain.digest()) == (key in LOCAL)


def test_the_digest_leaves_ownership_to_the_coordinator() -> None:
    """It may have chosen ("auto"); nodes compare what it says when they begin a generation."""
    two = {"coordinator": {"nodes": 2}}
    for owned in ({"chunks_per_node": [3, 1]}, {"assignment": "auto"}):
        assert convert(Config, two).digest() == convert(Config, {"coordinator": {"nodes": 2} | owned}).digest()


def test_the_digest_tells_what_depends_on_another_setting() -> None:
    two = {"coordinator": {"nodes": 2}}
    assert convert(Config, two).digest() == convert(Config, two | {"run": {}}).digest()
    fixed: Tree = {"rotation": "fixed", "subspace": "frozen"}
    more = [fixed | {"subspace": "learned"}]
    more += [more[0] | {"centred": True}, more[0] | {"centred": True, "whitened": True}]
    digests = {convert(Config, {"compress": compress}).digest() for compress in (fixed, *more)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"centred": True}, "subspace = 'frozen': expected \"learned\", since compress.centred is set"),
        ({"subspace": "learned", "centred": True, "basis": "weights"}, "basis = 'weights': expected"),
        ({"subspace": "learned", "centred": True, "own": "projected"}, "own = 'projected': expected"),
        ({"subspace": "learned", "whitened": True}, "centred = false: expected true, since compress.whitened is set"),
        ({"format": "unit4"}, "format = 'unit4': sends numbers without a scale"),
        (
            {"subspace": "learned", "centred": True, "whitened": True, "format": "unit4"},
            'dense_format = "same": expected a format with scales',
        ),
    ],
)
def test_numbers_without_a_scale_need_what_gives_them_their_size(compress: Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^compress\\.{re.escape(message)}"):
        convert(Config, {"compress": {"rotation": "fixed"} | compress})


def test_the_digest_leaves_out_what_only_the_planner_reads() -> None:
    masked = {"data": {"document_masking": True}}
    told = {"data": {"document_masking": True, "document_tokens": 800.0}}
    assert convert(Config, masked).digest() == convert(Config, told).digest()
