from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from netem.config import Section, apply_overrides, convert, describe, dump_toml, load_toml
from netem.errors import ConfigError


class Part(Section, frozen=True):
    name: str = ""
    sizes: list[int] = []  # noqa: RUF012


class Inner(Section, frozen=True):
    chunks: Annotated[int, Meta(description="parts of a context", ge=1)] = 4
    mode: Annotated[Literal["dense", "compressed"] | None, Meta(description="what travels")] = None
    rate: float = 1.0

    def check(self, path: str) -> None:
        if self.chunks == 3:
            raise ConfigError(f"{path}chunks = 3: expected an even number")


class Outer(Section, frozen=True, kw_only=True):
    model: Inner = Inner()
    parts: tuple[Part, ...] = ()
    spare: str | Part = "none"
    needed: str


QUOTES = "write it in quotes, and a quantity with its unit, such as '300 Mbit/s' or '25 ms'"


def test_a_tree_becomes_a_section() -> None:
    tree = {"needed": "x", "model": {"chunks": 8, "rate": 2}, "parts": [{"name": "a"}]}
    config = convert(Outer, tree)
    assert config == Outer(needed="x", model=Inner(chunks=8, rate=2.0), parts=(Part(name="a"),))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "config: object missing required field `needed`"),
        ({"needed": 1}, f"needed = 1: expected `str`, got `int`; {QUOTES}"),
        ({"needed": "x", "model": {"chunks": 0}}, "model.chunks = 0: expected `int` >= 1"),
        ({"needed": "x", "model": {"chunks": "8"}}, 'model.chunks = "8": expected `int`, got `str`'),
        ({"needed": "x", "model": {"chunks": 3}}, "model.chunks = 3: expected an even number"),
        (
            {"needed": "x", "model": {"mode": "sparse"}},
            "model.mode = \"sparse\": expected one of 'dense', 'compressed'",
        ),
        ({"needed": "x", "model": {"chunk": 8}}, "model.chunk = 8: unknown key; did you mean chunks?"),
        ({"needed": "x", "model": 5}, "model = 5: expected `object`, got `int`"),
        ({"needed": "x", "zzz": {}}, "zzz: unknown key; known here: model, needed, parts, spare"),
        ({"needed": "x", "parts": [{"nam": "a"}]}, "parts[0].nam = 'a': unknown key; did you mean name?"),
        ({"needed": "x", "spare": {"nam": "a"}}, "spare.nam = 'a': unknown key; did you mean name?"),
        ({"needed": "x", "parts": [{}, {"name": 1}]}, f"parts[1].name = 1: expected `str`, got `int`; {QUOTES}"),
        ({"needed": "x", "parts": [{"sizes": [1, "b"]}]}, 'parts[0].sizes[1] = "b": expected `int`, got `str`'),
        ({"needed": "x", "model": {"rate": float("nan")}}, None),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_expectation(tree: dict[str, object], message: str | None) -> None:
    if message is None:
        convert(Outer, tree)  # no bound, so legal; bounds refuse it, see below
        return
    with pytest.raises(ConfigError) as raised:
        convert(Outer, tree)
    assert str(raised.value) == message


def test_the_path_of_a_section_prefixes_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"^run\.model\.chunks = 0: "):
        convert(Inner, {"chunks": 0}, "run.model")
    with pytest.raises(ConfigError, match=r"^run\.model\.chunks = 3: "):
        convert(Inner, {"chunks": 3}, "run.model")
    with pytest.raises(ConfigError, match=r"^model = 5: expected a table"):
        convert(Inner, 5, "model")  # type: ignore[arg-type]


def test_overrides() -> None:
    tree = {"model": {"chunks": 4}, "needed": "x"}
    arguments = ["--model.chunks", "8", "--model.rate=1e-3", "--needed", "a b", "--new.key", "[1, 2]", "--flag=true"]
    assert apply_overrides(tree, arguments) == {
        "model": {"chunks": 8, "rate": 1e-3},
        "needed": "a b",
        "new": {"key": [1, 2]},
        "flag": True,
    }
    assert tree == {"model": {"chunks": 4}, "needed": "x"}


@pytest.mark.parametrize("text", ["2026-01-01", "12:30:00", "a#b", "3\nmodel = 4", "", "tcp://127.0.0.1:0"])
def test_an_override_that_is_no_literal_is_a_string(text: str) -> None:
    assert apply_overrides({}, ["--run.name", text]) == {"run": {"name": text}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.steps", "3"], "'train.steps': expected --section.key VALUE"),
        (["--train.steps"], "--train.steps: a value is missing"),
        (["--needed.deep", "3"], "--needed.deep: needed is a value, not a table"),
        (["--", "3"], "expected --section.key VALUE"),
    ],
)
def test_a_broken_override_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"needed": "x"}, arguments)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken, binary = tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("a = \n")
    binary.write_bytes(b"\xff\xfe")
    cases = {tmp_path / "gone.toml": "no such file", tmp_path: "is a folder", broken: "not valid", binary: "not valid"}
    cases[broken / "below.toml"] = "cannot be read"
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_toml(path)


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
trees = st.recursive(
    scalars | st.lists(scalars, max_size=4),
    lambda inner: st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), trees, max_size=4))
def test_what_is_dumped_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(dump_toml(tree), encoding="utf-8", newline="")
    assert load_toml(path) == tree


def test_tables_in_lists_and_missing_values_are_dumped_too(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump_toml({"a": {"pairs": [{"from": "x", "to": "y"}], "none": None}, "b": {}}))
    assert load_toml(path) == {"a": {"pairs": [{"from": "x", "to": "y"}]}, "b": {}}


def test_describe_lists_every_setting_with_its_default() -> None:
    keys = {key.path: key for key in describe(Outer)}
    assert list(keys) == ["model.chunks", "model.mode", "model.rate", "parts", "spare", "needed"]
    assert keys["model.chunks"] == ("model.chunks", "int", "4", "parts of a context")
    assert keys["model.mode"][1:] == ("dense | compressed", "", "what travels")
    assert keys["needed"].default == "required"
    assert keys["spare"].type_name == "str | Part"
