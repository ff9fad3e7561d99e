"""A folder that `transformers` saved gives our decoder its logits; anything but a whole plain Llama is refused.

Measured in float32, relative to the largest logit: 8e-7.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama_folders import LLAMA3, logits_of, save_llama
from helpers.small import VOCAB, contexts, largest_difference
from helpers.worlds import DEFAULTS, WORLDS, exchange_of, full_spec
from helpers.worlds import logits_of as our_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from netem.config import convert, merge
from netem.errors import ConfigError
from node.config import Config
from node.config.pretrained import with_folder
from node.model.hf import from_hf, to_hf
from node.train.from_config import first_model
from node.train.passes import own_tokens

TOLERANCE = 2e-6


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"init": str(folder), "context": 32, "chunks": 4},
        "compress": DEFAULTS["compress"] | {"mode": "dense"},
        "train": DEFAULTS["train"],
    }
    return convert(Config, with_folder(merge(tree, sections)))


def difference(config: Config, llama: Any) -> float:
    model, batch = first_model(config, VOCAB), contexts(config)
    exchange, spec = exchange_of(config, WORLDS["1"], 0, None), full_spec(config)
    inputs, _ = own_tokens(batch, exchange.own, spec, torch.device("cpu"))
    with torch.no_grad():
        ours = our_logits(model, inputs, exchange, spec).movedim(0, 1).flatten(1, 2)
    off = largest_difference({"": ours}, {"": logits_of(llama, torch.from_numpy(batch[:, :-1]))})
    print(f"logits differ by {off:.1e}")
    return off


FOLDERS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "tied, sharded": {"tie_word_embeddings": True, "shard": "20KB"},
    "untied, sharded": {"tie_word_embeddings": False, "shard": "20KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "wide heads": {"head_dim": 12},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "Llama 3.1's rope": {"rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("settings", FOLDERS.values(), ids=FOLDERS.keys())
def test_our_logits_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    llama = save_llama(tmp_path, **settings)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in settings)
    assert difference(config_of(tmp_path), llama) < TOLERANCE


def test_a_scaling_that_is_left_out_shows(tmp_path: Path) -> None:
    """The test of Llama 3.1's RoPE can fail."""
    llama = save_llama(tmp_path, rope_parameters=LLAMA3)
    rewrite(tmp_path, rope_parameters=LLAMA3 | {"rope_type": "default"})
    assert difference(config_of(tmp_path), llama) > 1e-3


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_older_spelling_of_rope_scaling_is_read(key: str, tmp_path: Path) -> None:
    llama = save_llama(tmp_path, rope_parameters=LLAMA3)
    old = {name: value for name, value in LLAMA3.items() if name not in ("rope_theta", "rope_type")}
    rewrite(tmp_path, rope_parameters=None, rope_theta=LLAMA3["rope_theta"], rope_scaling=old | {key: "llama3"})
    assert difference(config_of(tmp_path), llama) < TOLERANCE


def test_the_shape_is_the_folders(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters=LLAMA3, tie_word_embeddings=False)
    model = config_of(tmp_path, model={"heads": 4}).model
    assert (model.layers, model.d_model, model.heads, model.kv_heads, model.head_dim) == (2, 32, 4, 2, 8)
    assert (model.ffn_dim, model.norm_eps, model.tied, model.context) == (48, 1e-6, False, 32)
    assert (model.rope_theta, model.rope_scaling.factor, model.rope_scaling.original_context) == (500.0, 8.0, 64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"layers": 3}, r"^model.layers = 3: .*config.json says 2; leave the key out"),
        ({"norm_eps": 1e-5}, r"^model.norm_eps = 1e-05: .* says 1e-06"),
        ({"tied": True}, r"^model.tied = true: .* says false"),
        ({"rope_scaling": {"factor": 2.0}}, r"^model.rope_scaling.factor = 2.0: .* says 1.0"),
    ],
)
def test_a_key_that_differs_is_refused_by_name(given: dict[str, Any], expected: str, tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=expected):
        config_of(tmp_path, model=given)


def test_a_resolved_config_needs_no_folder(tmp_path: Path) -> None:
    """A coordinator's machine has none. One that is there is compared."""
    save_llama(tmp_path / "llama")
    config = config_of(tmp_path / "llama")
    (tmp_path / "llama").rename(tmp_path / "moved")
    from node.config import to_tree

    assert convert(Config, with_folder(to_tree(config))) == config
    with pytest.raises(ConfigError, match=r"llama': no such folder; give the Hugging Face folder of a Llama"):
        config_of(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"llama': no such folder"):
        first_model(config, VOCAB)


def rewrite(folder: Path, **settings: Any) -> None:
    """Lay settings over config.json; None takes a key out."""
    content = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "mistral"}, 'model_type = "mistral": .* expected "llama"'),
    "attention bias": ({"attention_bias": True}, "attention_bias = true"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = true"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, 'quantization_config = "gptq": .* dequantised'),
    "another scaling": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn': expected"),
    "half a scaling": ({"rope_parameters": {"rope_type": "llama3"}}, "needs a number for factor, low_freq_factor"),
    "no width": ({"hidden_size": None}, "not the config of a Llama: .*hidden_size"),
    "a width in words": ({"hidden_size": "wide"}, "not the config of a Llama: .*hidden_size"),
}


@pytest.mark.parametrize(("settings", "reason"), OTHERS.values(), ids=OTHERS.keys())
def test_another_function_is_refused_by_name(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    rewrite(tmp_path, **settings)
    with pytest.raises(ConfigError, match=rf"config.json: .*{reason}") as refused:
        config_of(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, shard="20KB")
    config = config_of(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"index.json names {shard.name}, which is not there; fetch all"):
        first_model(config, VOCAB)
    shard.write_bytes(content[:-100])
    with pytest.raises(ConfigError, match=rf"{shard.name}: cannot be read as safetensors"):
        first_model(config, VOCAB)


K_PROJ = "model.layers.0.self_attn.k_proj.weight"
TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({K_PROJ: None}, rf"{K_PROJ} is in none of its files"),
    "another shape": ({K_PROJ: torch.zeros(32, 32)}, rf"{K_PROJ} is 32×32, and config.json asks for 16×32"),
    "packed": ({K_PROJ: torch.zeros(16, 32, dtype=torch.int8)}, rf"{K_PROJ} is torch.int8; .* dequantise"),
    "not finite": ({K_PROJ: torch.full((16, 32), torch.inf)}, rf"{K_PROJ} holds numbers that are not finite"),
    "an attention bias": ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias has no place"),
    "another head": ({"score.weight": torch.zeros(2, 32)}, "score.weight has no place in a Llama"),
    "no output head": ({"lm_head.weight": None}, "lm_head.weight is in none of its files"),
}


@pytest.mark.parametrize(("changes", "reason"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor | None], reason: str, tmp_path: Path
) -> None:
    save_llama(tmp_path, tie_word_embeddings=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ConfigError, match=reason) as refused:
        first_model(config_of(tmp_path), VOCAB)
    assert str(tmp_path) in str(refused.value)


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    for size in (VOCAB - 1, VOCAB + 1):
        with pytest.raises(ConfigError, match=rf"data.tokenizer = 'gpt2': makes data of {size} tokens, .* {VOCAB}"):
            first_model(config_of(tmp_path), size)
    padded = first_model(config_of(tmp_path, data={"tokenizer": "./folder"}), VOCAB - 1)
    assert len(padded.embed_tokens.weight) == VOCAB


def test_names_go_there_and_back(tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=False)
    names = dict(first_model(config_of(tmp_path), VOCAB).named_parameters()).keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {to_hf(name) for name in names} == set(file.keys())
    assert [from_hf(to_hf(name)) for name in names] == list(names)
