from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from netem.config import (
    Section,
    apply_overrides,
    convert,
    describe,
    dump_toml,
    flat,
    load_toml,
    merge,
    toml_value,
    user_path,
)
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
    ends: tuple[str, str] | None = None
    label: Annotated[str, Meta(max_length=3)] = ""
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5


QUOTES = "write it in quotes, and a quantity with its unit, such as '300 Mbit/s' or '25 ms'"


def test_a_tree_becomes_a_section() -> None:
    tree = {"needed": "x", "model": {"chunks": 8, "rate": 2}, "parts": [{"name": "a"}]}
    config = convert(Outer, tree)
    assert config == Outer(needed="x", model=Inner(chunks=8, rate=2.0), parts=(Part(name="a"),))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "needed: is missing, and has no default"),
        ({"needed": 1}, f"needed = 1: expected text, not a whole number; {QUOTES}"),
        ({"needed": "x", "model": {"chunks": 0}}, "model.chunks = 0: expected a whole number of at least 1"),
        ({"needed": "x", "model": {"chunks": "8"}}, 'model.chunks = "8": expected a whole number, not text'),
        ({"needed": "x", "model": {"chunks": 3}}, "model.chunks = 3: expected an even number"),
        (
            {"needed": "x", "model": {"mode": "sparse"}},
            "model.mode = \"sparse\": expected one of 'dense', 'compressed'",
        ),
        ({"needed": "x", "model": {"chunk": 8}}, "model.chunk = 8: unknown key; did you mean chunks?"),
        ({"needed": "x", "model": 5}, "model = 5: expected a table of settings, not a whole number"),
        ({"needed": "x", "zzz": {}}, "zzz: unknown key; known here: ends, label, model, needed, parts, share, spare"),
        ({"needed": "x", "parts": [{"nam": "a"}]}, "parts[0].nam = 'a': unknown key; did you mean name?"),
        ({"needed": "x", "spare": {"nam": "a"}}, "spare.nam = 'a': unknown key; did you mean name?"),
        (
            {"needed": "x", "parts": [{}, {"name": 1}]},
            f"parts[1].name = 1: expected text, not a whole number; {QUOTES}",
        ),
        ({"needed": "x", "parts": [{"sizes": [1, "b"]}]}, 'parts[0].sizes[1] = "b": expected a whole number, not text'),
        ({"needed": "x", "model": {"rate": float("nan")}}, "model.rate = nan: expected a finite number"),
        ({"needed": "x", "model": {"rate": float("inf")}}, "model.rate = inf: expected a finite number"),
        ({"needed": "x", "model": {"rate": float("-inf")}}, "model.rate = -inf: expected a finite number"),
        (
            {"needed": "x", "model": {"chunks": 1 << 63}},
            "model.chunks = 9223372036854775808: expected a whole number of at most 9223372036854775807",
        ),
        (
            {"needed": "x", "parts": [{}, {"sizes": [-(1 << 63) - 1]}]},
            "parts[1].sizes[0] = -9223372036854775809: expected a whole number of at most 9223372036854775807",
        ),
        ({"needed": "x", "model": {"rate": 10**400}}, f"model.rate = {10**400}: expected a smaller number"),
        ({"needed": "x", "parts": {"name": "a"}}, "parts: expected a list, not a table of settings"),
        ({"needed": "x", "ends": ["a"]}, 'ends = ["a"]: expected a list of 2 values, not 1'),
        ({"needed": "x", "ends": 1}, "ends = 1: expected a list, not a whole number"),
        ({"needed": "x", "label": "too long"}, 'label = "too long": expected text of at most 3 characters'),
        ({"needed": "x", "share": 1.5}, "share = 1.5: expected a number of at most 1"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_expectation(tree: dict[str, object], message: str) -> None:
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
        (["--run.resume", "--train.steps", "3"], "--run.resume: a value is missing; write --run.resume VALUE"),
        (["--needed.deep", "3"], "--needed.deep: needed is a value, not a table"),
        (["--", "3"], "expected --section.key VALUE"),
    ],
)
def test_a_broken_override_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"needed": "x"}, arguments)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken, binary, deep = (tmp_path / f"{name}.toml" for name in ("broken", "binary", "deep"))
    broken.write_text("a = \n")
    binary.write_bytes(b"\xff\xfe")
    deep.write_text(f"a = {'[' * 100_000}")
    cases = {tmp_path / "gone.toml": "no such file", tmp_path: "is a folder", broken: "not valid", binary: "not valid"}
    cases[deep] = "nested too deeply"
    cases[broken / "below.toml"] = "cannot be read"
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_toml(path)


def test_a_byte_order_mark_is_read_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert load_toml(path) == {"a": 1}


def test_an_override_nested_too_deeply_is_text() -> None:
    assert apply_overrides({}, ["--a", "[" * 100_000]) == {"a": "[" * 100_000}


@pytest.mark.parametrize(
    ("value", "text"),
    [((1, 2), "[1, 2]"), ({"a": ("x",)}, '{ a = ["x"] }'), ({}, "{}"), ("a\nb", '"a\\nb"'), (1e-5, "1e-05")],
)
def test_one_value_on_one_line(value: object, text: str) -> None:
    assert toml_value(value) == text


def test_flat_and_merge() -> None:
    below, above = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}}
    assert flat(merge(below, above)) == {"a.b": 1, "a.c": 4, "d.e": 5}
    assert below == {"a": {"b": 1, "c": 2}, "d": 3}


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert user_path("~/runs", "run.outputs") == Path("/home/anna/runs")
    assert user_path("runs/~", "run.outputs") == Path("runs/~")
    with pytest.raises(ConfigError, match=r"^run\.outputs = '~nobody-at-all/runs': this user has no home folder"):
        user_path("~nobody-at-all/runs", "run.outputs")


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
    assert list(keys)[:6] == ["model.chunks", "model.mode", "model.rate", "parts", "spare", "needed"]
    assert keys["model.chunks"] == ("model.chunks", "whole number", "4", "parts of a context", ())
    assert keys["model.mode"][1:] == ("dense or compressed", "", "what travels", ("dense", "compressed"))
    assert keys["needed"].default == "required"
    assert keys["spare"].type_name == "text or table of settings"
