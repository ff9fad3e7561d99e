"""A run that begins from a Llama folder: its basis, its barrier, its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordinated import Coordinator, Session, Still, corpus, make_world
from helpers.llama_folders import logits_of, save_llama, save_tokenizer
from helpers.small import VOCAB, contexts, largest_difference
from helpers.threads import ThreadWire, run_ranks
from helpers.worlds import DEFAULTS, WORLDS

from coordinator.barrier import Barrier, Disagreement
from coordinator.messages import Ready
from coordinator.records.folder import CONFIG, mark_complete
from netem.config import convert, merge
from node.commands.evaluate import evaluate
from node.commands.export import export
from node.config import Config, save_config
from node.config.pretrained import with_folder
from node.data import open_data
from node.data.tokenizers import make_tokenizer
from node.subspace.basis import principal_directions
from node.train.basis import weight_moments
from node.train.checkpoint import Checkpoints
from node.train.from_config import first_model, payload_format
from node.train.optimizer import make_optimizer
from node.train.trainer import Trainer


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"init": str(folder), "context": 32, "chunks": 4},
        "compress": DEFAULTS["compress"] | {"warmup_steps": 0, "dense_last_layers": 0},
        "train": DEFAULTS["train"] | {"sync_every": 1, "steps": 3, "lr": 1e-4},
    }
    return convert(Config, with_folder(merge(tree, sections)))


def train(config: Config, name: str, folder: Path) -> tuple[Coordinator, list[Trainer]]:
    chunks = WORLDS[name]
    shared = Coordinator(config, chunks, config.train.steps)

    def work(rank: int, wire: ThreadWire) -> Trainer:
        session, payload = Session(shared, rank), payload_format(config)
        trainer = Trainer(config, corpus(), first_model(config, VOCAB, payload.ranks))
        trainer.run(make_world(payload, chunks, wire, session, folder / name), session, Still())
        return trainer

    return shared, run_ranks(len(chunks), work)


@pytest.mark.parametrize("basis", ["weights", "activations"])
def test_the_basis_is_taken_at_the_first_step_from_the_weights_that_were_loaded(basis: str, tmp_path: Path) -> None:
    """From the start compressed, in one world as in another; that of the weights is checked against the folder's."""
    save_llama(tmp_path / "llama")
    config = config_of(tmp_path / "llama", compress={"basis": basis})
    one, (trainer,) = train(config, "1", tmp_path)
    four, _ = train(config, "4", tmp_path)
    assert one.losses() == pytest.approx(four.losses(), rel=1e-5)
    said = [by_step[0] for by_step in one.said[0].values() if by_step[0] is not None]
    assert 0 < said[0]["k_energy_kept"] < 1
    if basis == "weights":
        moments = weight_moments(first_model(config, VOCAB))
        for key, codec in trainer.model.codecs():
            wanted = principal_directions(moments[key], codec.leading.shape[-1])
            assert torch.equal(codec.leading, wanted)


def test_compression_is_on_at_the_first_step(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    losses = [
        train(config_of(tmp_path / "llama", compress={"mode": mode}), "1", tmp_path / mode)[0].losses()[0]
        for mode in ("subspace", "dense", "local")
    ]
    assert len(set(losses)) == 3


def test_nodes_with_different_folders_differ_at_the_first_barrier(tmp_path: Path) -> None:
    """The config does not tell them apart, since a folder may lie elsewhere on each node. The weights do."""
    save_llama(tmp_path / "a")
    save_llama(tmp_path / "b", initializer_range=0.03)
    save_llama(tmp_path / "c")
    configs = [config_of(tmp_path / name) for name in "abc"]
    assert len({config.digest() for config in configs}) == 1
    digests = [train(config, "1", tmp_path / "runs")[0].said[0][0][1] for config in configs]
    assert digests[0] == digests[2]

    def differing(one: dict[str, str], other: dict[str, str]) -> Disagreement | None:
        barrier = Barrier(["node-0", "node-1"], 0, 1.0)
        for peer, said in (("node-0", one), ("node-1", other)):
            barrier.ready(peer, Ready(step=0, digests=said), 0.0)
        return barrier.disagreement()

    found = differing(digests[0], digests[1])
    assert found is not None
    assert found.reason.startswith("step 0: weights is not the same on all nodes: node-0 has ")
    assert differing(digests[0], digests[2]) is None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_what_began_from_a_folder_is_exported_to_the_same_logits(tied: bool, shard: str, tmp_path: Path) -> None:
    """With more tokens embedded than the tokenizer has, as is usual; `eval` reads such a checkpoint too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = save_llama(tmp_path / "llama", shard=shard, tie_word_embeddings=tied, vocab_size=320)
    save_tokenizer(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    data = {"corpus": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "llama"), "cache": str(tmp_path / "c")}
    run = {"outputs": str(tmp_path), "name": "trained"}
    config = config_of(tmp_path / "llama", compress={"mode": "dense"}, data=data, run=run, train={"batch": 1})
    task = open_data(config.data)
    model = first_model(config, task.vocab_size)
    assert task.vocab_size < 320 == len(model.embed_tokens.weight)
    Checkpoints(config.run.folder, 0, task.fingerprint).save(3, model, make_optimizer(model, config.train))
    save_config(config, config.run.folder / CONFIG)
    mark_complete(config.run.folder, 3, nodes=1)
    assert evaluate(config.run.folder, 1).loss > 0

    export(config.run.folder, tmp_path / "hf")
    exported, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.from_numpy(contexts(config))
    assert largest_difference({"": logits_of(exported, tokens)}, {"": logits_of(llama, tokens)}) < 2e-6
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), make_tokenizer(data["tokenizer"])
    assert tokenizer("the best")["input_ids"] == ours.encode_document("the best").tolist()
    assert exported.config.eos_token_id == tokenizer.eos_token_id == ours.eot


def test_llama_3_scaling_survives_the_export(tmp_path: Path) -> None:
    from helpers.llama_folders import LLAMA3
    from transformers import LlamaConfig

    from node.export.folder import model_files

    save_llama(tmp_path / "llama", rope_parameters=LLAMA3)
    config = config_of(tmp_path / "llama")
    written = LlamaConfig(**model_files(config.model, VOCAB, None)["config.json"])
    assert {key: written.rope_parameters[key] for key in LLAMA3} == LLAMA3
