"""`isthmus eval`, `export` and `run --run.resume` on the folder of a run: what they find, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_files import rewrite
from helpers.command_line import TINY, mistake
from torch import Tensor

from coordinator.records.folder import CONFIG, EVALUATION, checkpoint_folder, mark_complete
from netem.errors import ConfigError
from node.cli import main
from node.commands.run import check_corpus, check_network
from node.config import load_config, save_config
from node.train.checkpoint import Checkpoints
from node.train.from_config import drawn_model
from node.train.optimizer import make_optimizer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 400


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """A run of one step, as `isthmus run` leaves it: its folder."""

    def make(*settings: str) -> Path:
        (tmp_path / "text.txt").write_text(TEXT)
        overrides = ["--data.corpus", "./text.txt", "--data.tokenizer", "bytes", "--data.cache", "cache"]
        overrides += ["--model.context", "64", "--model.layers", "2", "--coordinator.nodes", "2"]
        config = load_config(Path(TINY), [*overrides, *settings])
        model = drawn_model(config, 257)
        if not model.ranks.chosen:  # a run would have chosen them
            model.ranks.choose({key: 3 + number for number, key in enumerate(model.ranks.keys)})
            for _, codec in model.codecs():
                codec.fit()
        Checkpoints(config.run.folder, 0).save(25, model, make_optimizer(model, config.train))
        save_config(config, config.run.folder / CONFIG)
        return config.run.folder

    return make


def test_eval_of_a_complete_checkpoint(trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained()
    assert "holds no complete checkpoint" in mistake(["eval", str(folder)], capsys)
    checkpoint = checkpoint_folder(folder, 25)
    assert "is not complete (a node had not saved its part)" in mistake(["eval", str(checkpoint)], capsys)
    mark_complete(folder, 25, nodes=2)
    for path in (folder, checkpoint):
        assert main(["eval", str(path), "--batches", "3"]) == 0
        out = capsys.readouterr().out
        assert "step 25: held-out loss 5.5" in out  # ln 257 = 5.55: it has learned nothing
        assert f"over {3 * 2 * 64} tokens" in out
    facts = json.loads((checkpoint / EVALUATION).read_text())
    assert facts["tokens"] == 3 * 2 * 64
    assert main(["eval", str(folder), "--batches", "3", "--compress.mode", "dense"]) == 0


def test_eval_refuses_another_corpus_and_writes_no_loss_that_is_not_finite(
    trained: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained()
    mark_complete(folder, 25, nodes=2)
    evaluation = checkpoint_folder(folder, 25) / EVALUATION
    with monkeypatch.context() as patched:
        patched.setattr("node.train.evaluate.heldout_loss", lambda *_: (float("nan"), 7))
        assert main(["eval", str(folder)]) == 1
    assert "step-000025: the held-out loss is nan; use an earlier checkpoint" in capsys.readouterr().err
    assert not evaluation.exists()
    path = checkpoint_folder(folder, 25) / "model.safetensors"
    rewrite(path, lambda tensors: tensors, corpus="another")
    assert "was trained on another corpus (fingerprint another, here " in mistake(["eval", str(folder)], capsys)
    assert not evaluation.exists()


@pytest.mark.parametrize("command", ["eval", "export"])
def test_weights_that_are_not_finite_are_refused(
    command: str, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = trained("--compress.mode", "dense")
    mark_complete(folder, 25, nodes=2)
    path = checkpoint_folder(folder, 25) / "model.safetensors"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["norm.weight"][0] = float("inf")

    rewrite(path, spoil)
    arguments = [command, str(folder), *([str(tmp_path / "hf")] if command == "export" else [])]
    said = mistake(arguments, capsys)
    assert "norm.weight is not finite; no checkpoint before it is sound; train anew with a lower train.lr" in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("subspace", ["frozen", "learned"])
def test_eval_knows_the_ranks_that_a_run_chose(subspace: str, trained: Callable[..., Path]) -> None:
    settings = {"budget_bytes_per_token": "60", "format": "int4", "rotation": "fixed", "subspace": subspace}
    folder = trained(*(text for key, value in settings.items() for text in (f"--compress.{key}", value)))
    mark_complete(folder, 25, nodes=2)
    assert main(["eval", str(folder), "--batches", "3"]) == 0


def test_eval_of_a_checkpoint_that_does_not_fit(
    trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained()
    mark_complete(folder, 25, nodes=2)
    assert "other [model] or [compress] settings" in mistake(["eval", str(folder), "--model.d_model", "32"], capsys)
    assert "has only 46 contexts" in mistake(["eval", str(folder), "--train.batch", "500"], capsys)
    (checkpoint_folder(folder, 25) / "model.safetensors").write_bytes(b"\x00" * 50)
    assert "not a whole safetensors file" in mistake(["eval", str(folder)], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained()
    mark_complete(folder, 25, nodes=2)
    wanted = "run.device = 'cuda': torch finds no GPU here"
    assert wanted in mistake(["eval", str(folder), "--run.device", "cuda"], capsys)
    assert wanted in mistake(["node", TINY, "--join", "tcp://127.0.0.1:1", "--run.device", "cuda"], capsys)


def test_resuming_what_cannot_be_resumed(trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained()
    mark_complete(folder, 25, nodes=4)
    resume = ["coordinator", str(folder / "config.toml"), "--run.resume", "true"]
    assert "raise train.steps" in mistake([*resume, "--train.steps", "25"], capsys)


def test_a_corpus_too_short_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:4000])
    data = ["--data.corpus", "./text.txt", "--data.tokenizer", "bytes", "--data.cache", "cache"]
    check_corpus(load_config(Path(TINY), [*data, "--model.context", "64"]))
    with pytest.raises(ConfigError, match=r"model\.context = 65536: the training part of the corpus has"):
        check_corpus(load_config(Path(TINY), [*data, "--model.context", "65536"]))
    with pytest.raises(ConfigError, match=r"model\.context = 1024: the held-out part of the corpus has"):
        check_corpus(load_config(Path(TINY), [*data, "--model.context", "1024"]))
    with pytest.raises(ConfigError, match=r"train\.batch = 50: the held-out part of the corpus has only 6 contexts"):
        check_corpus(load_config(Path(TINY), [*data, "--model.context", "64", "--train.batch", "50"]))


def test_a_profile_that_names_no_node_of_the_run_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "far.toml").write_text(
        'rate = "1 Mbit/s"\n[[pairs]]\nfrom = "node-0"\nto = "node-3"\nlatency = "1 s"\n'
    )
    net = ["--net.profile", "./far.toml", "--coordinator.nodes"]
    check_network(load_config(Path(TINY), [*net, "4"]))
    with pytest.raises(ConfigError, match=r"\[\[pairs\]\] names 'node-3', which matches no node or site in this run"):
        check_network(load_config(Path(TINY), [*net, "2"]))
