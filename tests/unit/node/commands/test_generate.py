"""`isthmus generate`: its logits are those of whole passes, from checkpoints and from exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.command_line import TINY, mistake

from coordinator.assignment import assign
from coordinator.records.folder import CONFIG, mark_complete
from node.cli import main
from node.config import Config, load_config, save_config
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.export.generate import next_logits
from node.model.exchanged import ExchangedLlama
from node.train.basis import restore_basis
from node.train.checkpoint import Checkpoints
from node.train.from_config import drawn_model, payload_format
from node.train.optimizer import make_optimizer

STEP = 25


def config_of(*settings: str) -> Config:
    overrides = ["--data.tokenizer", "bytes", "--model.context", "64", "--model.layers", "2"]
    return load_config(Path(TINY), [*overrides, *settings])


def model_of(config: Config) -> ExchangedLlama:
    model = drawn_model(config, 257)
    if not model.ranks.chosen:  # a run would have chosen them
        model.ranks.choose({key: 3 + number for number, key in enumerate(model.ranks.keys)})
        for _, codec in model.codecs():
            codec.fit()
    restore_basis(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # so that tokens differ in their logits
    return model.eval()


def trained(*settings: str) -> Path:
    config = config_of(*settings)
    model = model_of(config)
    Checkpoints(config.run.folder, 0).save(STEP, model, make_optimizer(model, config.train))
    save_config(config, config.run.folder / CONFIG)
    mark_complete(config.run.folder, STEP, nodes=2)
    return config.run.folder


def generated(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("mode", ["subspace", "dense"])
def test_logits_are_those_of_a_whole_pass_over_any_later_tokens(mode: str) -> None:
    exact = ["--compress.format", "float32", "--compress.dense_format", "same"]
    config = config_of("--compress.mode", mode, "--compress.warmup_steps", "2", *exact)
    model = model_of(config)
    exchange = ChunkExchange(assign(config.model.chunks, 1), 0, payload_format(config, model.ranks))
    spec = PassSpec(config.model.chunk_tokens, compressed=mode == "subspace")
    context = torch.randint(257, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        handle = exchange.begin(spec, trains=False)
        whole = model.logits(context.view(-1, 1, spec.tokens), handle).flatten(0, 2)
        handle.finish_forward()
    for length in (1, 15, 16, 17, 40, 64):
        found = next_logits(model, exchange, spec, context[:length].tolist())
        torch.testing.assert_close(found, whole[length - 1], rtol=1e-4, atol=1e-4)
    further = [3, 4, 5, *context.tolist()]
    torch.testing.assert_close(next_logits(model, exchange, spec, further), whole[-1], rtol=1e-4, atol=1e-4)


def test_an_export_goes_on_as_transformers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    run = trained("--compress.mode", "dense")
    assert main(["export", str(run), "out"]) == 0
    capsys.readouterr()
    found = generated(capsys, "out", "--prompt", "It was", "--tokens", "12", "--temperature", "0")
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    ids = torch.tensor([list(b"It was")])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    theirs = theirs[: theirs.index(256)] if 256 in theirs else theirs
    assert found == bytes(theirs).decode("utf-8", "replace")
    assert generated(capsys, run, "--prompt", "It was", "--tokens", "12", "--temperature", "0") == found


def test_a_seed_gives_the_same_text_and_another_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("--compress.warmup_steps", "2")
    words = [run, "--prompt", "It was", "--tokens", "20", "--temperature", "2"]
    first = generated(capsys, *words)
    assert first.startswith("It was")
    assert len(first) > 8
    assert generated(capsys, *words) == first
    assert generated(capsys, *words, "--seed", "1") != first
    assert generated(capsys, run, "--tokens", "3") != ""
    assert generated(capsys, *words, "--data.document_masking", "true") == first


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained()
    assert "--tokens: expected 1 or more" in mistake(["generate", str(run), "--tokens", "0"], capsys)
    assert "no such folder" in mistake(["generate", str(tmp_path / "none")], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    assert "model_type" in mistake(["generate", str(tmp_path / "other")], capsys)


def test_a_model_that_looks_at_later_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    leak = ["--compress.own", "projected", "--compress.theta", "chunk", "--compress.warmup_steps", "2"]
    assert config_of(*leak).leaks
    run = trained(*leak)
    assert "depend on tokens that are not written yet" in mistake(["generate", str(run)], capsys)
    assert generated(capsys, run, "--prompt", "It", "--tokens", "2", "--compress.mode", "dense").startswith("It")
