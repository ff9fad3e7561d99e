"""How a command line is split: settings may stand anywhere, and every word is an option, a setting or a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from netem.errors import ConfigError
from node.options import parse, split_settings


@pytest.mark.parametrize(
    ("words", "config", "settings"),
    [
        ("run --train.steps 5 tiny.toml", "tiny.toml", "--train.steps 5"),
        ("run tiny.toml --train.steps 5", "tiny.toml", "--train.steps 5"),
        ("run --train.steps=5 tiny.toml --run.name a.b", "tiny.toml", "--train.steps=5 --run.name a.b"),
        ("plan --net.profile ./lte.toml tiny.toml", "tiny.toml", "--net.profile ./lte.toml"),
        ("--train.lr -1 run tiny.toml", "tiny.toml", "--train.lr -1"),
        ("coordinator --net.profile=./lte.toml tiny.toml", "tiny.toml", "--net.profile=./lte.toml"),
    ],
)
def test_settings_before_the_config_file(words: str, config: str, settings: str) -> None:
    options, found = parse(words.split())
    assert options.config == Path(config)
    assert found == settings.split()


@pytest.mark.parametrize(
    "word", ["--out=a.png", "--png", "a.b=c", "./x.toml", "tcp://10.0.0.5:7070", "--", "-.5", "--.x"]
)
def test_what_is_no_setting(word: str) -> None:
    assert split_settings([word, "next"]) == ([word, "next"], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run tiny.toml --train.steps", "--train.steps: a value is missing; write --train.steps VALUE"),
        ("run --run.resume --train.steps 5 tiny.toml", "--run.resume: a value is missing"),
        (
            "run tiny.toml --jion x",
            "--jion x: not understood; a setting is given as --section.key VALUE; see isthmus run",
        ),
        ("report outputs/a --train.steps 5", "--train.steps 5: not understood; see isthmus report --help"),
        ("net show --coordinator outputs/a --net.rate x", "--net.rate x: not understood; see isthmus net show --help"),
    ],
)
def test_words_that_are_not_understood(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert str(caught.value).startswith(message)
