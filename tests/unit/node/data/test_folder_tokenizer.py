"""`data.tokenizer = FOLDER`: the ids of the `tokenizers` package, as an ordinary tokenizer of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_folders import save_tokenizer

from netem.config import convert
from netem.errors import ConfigError
from node.config.data import DataConfig
from node.data import open_data
from node.data.corpus import Corpus
from node.data.tokenizers import make_tokenizer
from node.export.tokenizer import exported_tokenizer, tokenizer_files

TEXT = "It was the best of times — naïve 漢字 🙂\n\n  <|im_end|> "


def test_ids_are_those_of_the_package_and_go_back_to_the_text(tmp_path: Path) -> None:
    theirs = save_tokenizer(tmp_path)
    ours = make_tokenizer(str(tmp_path))
    plain = TEXT.replace("<|im_end|>", "")
    assert ours.encode_document(plain).tolist() == theirs.encode(plain, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eot == theirs.token_to_id("<|im_end|>")
    assert ours.decode(ours.encode_document(plain)) == plain
    assert len(ours.encode_document("")) == 0
    assert ours.decode([ours.eot]) == "<|im_end|>"
    with pytest.raises(ValueError, match=f"token {ours.vocab_size}: expected"):
        ours.decode([ours.vocab_size])


def test_text_that_spells_a_special_token_is_ordinary(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    ours = make_tokenizer(str(tmp_path))
    ids = ours.encode_document(TEXT)
    assert ours.eot not in ids
    assert ours.decode(ids) == TEXT


def test_truncation_and_padding_are_left_aside(tmp_path: Path) -> None:
    theirs = save_tokenizer(tmp_path)
    wanted = make_tokenizer(str(tmp_path)).encode_document(TEXT).tolist()
    theirs.enable_truncation(3)
    theirs.enable_padding(length=100)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert make_tokenizer(str(tmp_path)).encode_document(TEXT).tolist() == wanted


def open_corpus(folder: Path, tokenizer: Path) -> Corpus:
    if not (folder / "text.txt").exists():  # a store is of one state of its file
        (folder / "text.txt").write_text(TEXT * 50)
    tree = {"corpus": str(folder / "text.txt"), "tokenizer": str(tokenizer), "cache": str(folder / "cache")}
    task = open_data(convert(DataConfig, tree, "data"))
    assert isinstance(task, Corpus)
    return task


def test_a_store_is_of_the_content_of_the_tokenizer(tmp_path: Path) -> None:
    """Not of its path: a folder that was moved gives the same store, and another one in its place gives another."""
    save_tokenizer(tmp_path / "one")
    first = open_corpus(tmp_path, tmp_path / "one")
    assert first.train[-1] == first.tokenizer.eot
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_corpus(tmp_path, tmp_path / "two").fingerprint == first.fingerprint
    save_tokenizer(tmp_path / "one", vocab_size=262)
    assert open_corpus(tmp_path, tmp_path / "one").fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache" / "tokens").glob("*/meta.json"))) == 2


@pytest.mark.parametrize(
    ("eos", "found"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_start|>"}}}, "<|im_start|>"),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
    ],
)
def test_the_end_of_a_document_is_the_folders_eos(eos: dict[str, Any], found: str, tmp_path: Path) -> None:
    theirs = save_tokenizer(tmp_path)
    for name, content in eos.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert make_tokenizer(str(tmp_path)).eot == theirs.token_to_id(found)


def test_mistakes_are_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nowhere': tokenizer.json cannot be read \(No such file"):
        make_tokenizer(str(tmp_path / "nowhere"))
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: eos_token = '</s>': is no token of tokenizer.json"):
        make_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"names no end of a document; set eos_token in tokenizer_config.json"):
        make_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a tokenizer"):
        make_tokenizer(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the package tokenizers; pip install 'isthmus\[data\]'"):
        make_tokenizer(str(tmp_path))


def test_it_is_written_back_as_autotokenizer_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    ours = make_tokenizer(str(tmp_path / "one"))
    (tmp_path / "hf").mkdir()
    for name, content in tokenizer_files(ours, 32).items():
        (tmp_path / "hf" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    plain = TEXT.replace("<|im_end|>", "")
    assert theirs(plain)["input_ids"] == ours.encode_document(plain).tolist()
    assert theirs.eos_token_id == ours.eot
    assert theirs.chat_template == "{{ messages }}"


def test_an_export_refuses_a_tokenizer_of_more_tokens_than_are_embedded(tmp_path: Path) -> None:
    from node.config import Config

    size = save_tokenizer(tmp_path).get_vocab_size()
    config = convert(Config, {"data": {"tokenizer": str(tmp_path)}})
    assert exported_tokenizer(config, size + 5).vocab_size == size
    with pytest.raises(ConfigError, match=rf"has {size} tokens, and the model embeds {size - 1}; put back"):
        exported_tokenizer(config, size - 1)
