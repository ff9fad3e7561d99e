"""The [data] section: what is refused before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from netem.config import convert
from netem.errors import ConfigError
from node.config.data import DataConfig, cache_folder


def test_default_is_the_embedded_corpus() -> None:
    config = convert(DataConfig, {}, "data")
    assert (config.corpus, config.tokenizer, config.max_tokens) == ("novels", "gpt2", 0)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"corpus": "finweb"}, "data.corpus = 'finweb'.*did you mean fineweb"),
        ({"corpus": "texts"}, r"data.corpus = 'texts'.*\./texts"),
        ({"corpus": ""}, "data.corpus"),
        ({"tokenizer": "gpt4"}, "data.tokenizer"),
        ({"max_tokens": -1}, "data.max_tokens = -1"),
        ({"text_field": ""}, "data.text_field"),
        ({"texts_field": "x"}, "data.texts_field.*did you mean text_field"),
        ({"corpus": "recall", "document_masking": True}, "data.document_masking = true: expected false"),
        ({"document_tokens": 500}, "data.document_tokens = 500: expected 0.*data.document_masking"),
    ],
)
def test_mistakes_are_named(tree: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        convert(DataConfig, tree, "data")


@pytest.mark.parametrize("corpus", ["fineweb", "c4", "bookcorpus", "./texts", "books.jsonl.xz", "~/books", "/no/such"])
def test_names_and_paths_are_accepted_without_looking_at_the_disk(corpus: str) -> None:
    assert convert(DataConfig, {"corpus": corpus}).corpus == corpus


def test_cache_folder_prefers_the_setting_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", "/from/environment")
    assert cache_folder(DataConfig(cache="/from/config")) == Path("/from/config")
    assert cache_folder(DataConfig()) == Path("/from/environment")
    monkeypatch.delenv("ISTHMUS_CACHE")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "isthmus"
