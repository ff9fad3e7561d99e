"""A study's run: the real trainer, all ranks in one process, and what it measures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.small import small_model
from helpers.worlds import exchange_of, full_spec, tiny_config
from safetensors.torch import save_file

from netem.errors import ConfigError, RunAborted
from node.config import Config
from node.data.recall import Recall
from node.lab.in_process import Coordinator, MemoryWire, Post
from node.lab.study.measure import position_losses, stable_rank
from node.lab.study.spectrum import checkpoint_ranks, checkpoint_table
from node.lab.study.start import Start
from node.lab.study.trial import run_trial
from node.train.evaluate import heldout_loss

torch.set_num_threads(1)
MODEL = {"layers": 2, "d_model": 32, "heads": 2, "kv_heads": 2, "ffn_dim": 32, "context": 128, "chunks": 16}


def config(**sections: dict[str, Any]) -> Config:
    """A few steps on the recall probe. One layer compresses, the other does not."""
    train = {"steps": 6, "batch": 2, "eval_batches": 1, "sync_every": 1}
    return tiny_config(
        model=MODEL,
        train=train | sections.pop("train", {}),
        data={"corpus": "recall"},
        **sections,
    )


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.lab.study.trial.FINAL_TOKENS", 4 * 128)
    monkeypatch.setattr("node.lab.study.trial.CURVE_TOKENS", 2 * 128)
    monkeypatch.setattr("node.lab.study.trial.CURVE_POINTS", 2)


@pytest.mark.usefixtures("_short")
def test_a_run_measures_what_the_study_shows() -> None:
    result = run_trial(config())
    assert [entry["step"] for entry in result["curve"]] == [0, 3, 6]
    assert result["curve"][0]["heldout_loss"] == pytest.approx(np.log(Recall.vocab_size), rel=0.1)
    assert result["heldout_loss"] == pytest.approx(sum(result["position_loss_sum"]) / result["heldout_tokens"])
    assert sum(result["position_tokens"]) == result["heldout_tokens"]
    assert result["position_tokens"][0] == 0  # nothing is asked for where facts are planted
    assert result["bytes"]["plain"] == 2 * 4 * 32
    assert 0 < result["bytes"]["compressed"] < result["bytes"]["layer"] < result["bytes"]["trained"]
    assert [len(entry["layers"]) for entry in result["stable_rank"]] == [2, 2, 2]
    assert json.loads(json.dumps(result))["config"]["data"]["corpus"] == "recall"
    assert result["heldout_loss"] == run_trial(config())["heldout_loss"]
    assert result["heldout_loss"] != run_trial(config(run={"seed": 1}))["heldout_loss"]


@pytest.mark.usefixtures("_short")
def test_an_arm_starts_where_its_trunk_ended(tmp_path: Path) -> None:
    """Its first evaluation is the trunk's last, whatever the arm sends. Noise of a millionth changes little."""
    kept = tmp_path / "trunk.safetensors"
    trunk = run_trial(config(compress={"mode": "dense"}), keep=kept)
    start = Start(kept, contexts=12)
    arm = run_trial(config(compress={"warmup_steps": 0}, run={"seed": 3}), start)
    assert arm["curve"][0]["heldout_loss"] == pytest.approx(trunk["curve"][-1]["heldout_loss"], rel=1e-6)
    again = run_trial(config(compress={"warmup_steps": 0}, run={"seed": 3}), replace(start, noise=1e-6))
    assert again["heldout_loss"] != arm["heldout_loss"]
    assert again["heldout_loss"] == pytest.approx(arm["heldout_loss"], abs=1e-3)
    elsewhere = run_trial(config(compress={"warmup_steps": 0}, run={"seed": 3}), replace(start, contexts=0))
    assert elsewhere["curve"][-1]["loss"] != arm["curve"][-1]["loss"]  # it reads other contexts


@pytest.mark.usefixtures("_short")
def test_a_run_may_do_without_a_warm_start() -> None:
    result = run_trial(config(compress={"warmup_steps": 0}))
    assert [entry["step"] for entry in result["curve"]] == [0, 3, 6]
    assert result["bytes"]["layer"] == result["bytes"]["trained"]


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("mode", ["dense", "subspace", "local"])
def test_ranks_in_one_process_equal_one_node(mode: str) -> None:
    alone = run_trial(config(compress={"mode": mode}))
    together = run_trial(config(compress={"mode": mode}, coordinator={"nodes": 4}))
    assert together["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=1e-4)
    losses = [[entry["loss"] for entry in result["curve"][1:]] for result in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("_short")
def test_rare_averaging_is_another_training() -> None:
    often = run_trial(config(coordinator={"nodes": 4}))
    rarely = run_trial(config(coordinator={"nodes": 4}, train={"sync_every": 3}))
    assert rarely["heldout_loss"] != pytest.approx(often["heldout_loss"], rel=1e-6)


def test_losses_by_position_add_up() -> None:
    of = tiny_config(model={"context": 64, "chunks": 16})
    model, exchange, spec = small_model(of), exchange_of(of, [list(range(16))], 0, None), full_spec(of)
    task = _Plain()
    total, count = position_losses(model, exchange, task, spec, 2, 3)
    loss, tokens = heldout_loss(model, exchange, task, spec, 2, 3)
    assert float(total.sum()) == pytest.approx(loss, rel=1e-5)
    assert int(count.sum()) == tokens
    assert count.tolist() == [6] * 64
    assert model.training


class _Plain(Recall):
    """Everything is asked for, in a small vocabulary."""

    def heldout_contexts(self, context: int, first: int, count: int) -> Any:
        return abs(super().heldout_contexts(context, first, count)) % 64


def test_stable_rank() -> None:
    assert stable_rank(torch.eye(8)) == pytest.approx(1.0)
    assert stable_rank(torch.ones(8, 4)) == pytest.approx(0.25)


def test_a_failure_of_one_rank_ends_the_others() -> None:
    post, lost = Post(), config(coordinator={"nodes": 2})
    wire = MemoryWire(post, 0)
    post.close()
    with pytest.raises(RunAborted, match="another rank failed"):
        wire.first_of("kv", 0, {1: 1}, 1)
    coordinator = Coordinator(lost, lost.assignment(), lambda step, metrics: None)
    coordinator.abort()
    with pytest.raises(RunAborted, match="another rank failed"):
        coordinator.ready(0, 0, None, {})


def test_a_checkpoint_on_disk(tmp_path: Path) -> None:
    names = {f"model.layers.{layer}.self_attn.{kind}_proj.weight": torch.eye(4) for layer in (0, 1) for kind in "qkv"}
    names["model.layers.1.self_attn.q_proj.weight"] = torch.ones(4, 4)
    save_file(names, tmp_path / "model.safetensors")
    ranks = checkpoint_ranks(tmp_path)
    assert ranks == {0: {"k": 1.0, "q": 1.0, "v": 1.0}, 1: {"k": 1.0, "q": pytest.approx(0.25), "v": 1.0}}
    last = checkpoint_table(ranks).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["mean", "62.50%", "100.00%", "100.00%"]
    save_file({"lm_head.weight": torch.eye(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"expected layers\.N\.self_attn"):
        checkpoint_ranks(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        checkpoint_ranks(tmp_path)


def shard(folder: Path, name: str, layers: list[int], **changes: torch.Tensor) -> None:
    names = {f"model.layers.{layer}.self_attn.{kind}_proj.weight": torch.eye(4) for layer in layers for kind in "qkv"}
    save_file(names | {key.replace("__", "."): value for key, value in changes.items()}, folder / name)


def test_a_checkpoint_is_measured_whole_or_not_at_all(tmp_path: Path) -> None:
    shard(tmp_path, "model-00001-of-00002.safetensors", [0])
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(ConfigError, match=r"holds the layers 0, and config\.json says 2 layers"):
        checkpoint_ranks(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index\.json names model-00002-of-00002\.safetensors, which is not there"):
        checkpoint_ranks(tmp_path)
    shard(tmp_path, "model-00002-of-00002.safetensors", [1])
    shard(tmp_path, "consolidated.safetensors", [0], model__layers__0__self_attn__q_proj__weight=torch.ones(4, 4))
    assert checkpoint_ranks(tmp_path)[0]["q"] == 1.0  # the index says which files count


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"[]", b'{"weight_map": 1, "num_hidden_layers": "x"}'])
def test_a_checkpoints_json_that_is_none_is_named(name: str, text: bytes, tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", [0])
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=f"{name}: expected") as caught:
        checkpoint_ranks(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("weight", [torch.ones(4, 4, dtype=torch.uint8), torch.ones(4)])
def test_weights_that_are_packed_or_no_matrices_are_refused(weight: torch.Tensor, tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", [0], model__layers__0__self_attn__q_proj__weight=weight)
    with pytest.raises(ConfigError, match=r"q_proj\.weight is .*; expected a matrix of floating-point numbers"):
        checkpoint_ranks(tmp_path)


def test_weights_that_are_not_finite_have_no_stable_rank(tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", [0], model__layers__0__self_attn__q_proj__weight=torch.full((4, 4), math.nan))
    with pytest.raises(ConfigError, match=r"q_proj\.weight holds numbers that are not finite"):
        checkpoint_ranks(tmp_path)


def test_a_study_has_no_nodes_of_several_processes() -> None:
    config = tiny_config()
    owners = msgspec.structs.replace(config.coordinator, shards=2)
    with pytest.raises(ConfigError, match=r"coordinator\.shards = 2, coordinator\.stages = 1: expected 1, since all"):
        run_trial(msgspec.structs.replace(config, coordinator=owners))
