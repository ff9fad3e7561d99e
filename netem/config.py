"""Typed configuration: strict sections read from TOML, overridable from the command line.

This is the machinery only. Each component owns its own `Section` (`NetConfig` in `netem.profile`,
`CoordinatorConfig` in `coordinator.config`, the rest and the whole tree in `node.config`).
Every mistake becomes one `ConfigError` line with the key, the value and what was expected.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from netem.errors import ConfigError

Tree = dict[str, Any]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the configuration. Types and bounds are in the annotations; `check` holds what they cannot say."""

    def check(self, path: str) -> None:
        """Raise `ConfigError` where the values, each legal, do not fit together. `path` prefixes keys: "model."."""


S = TypeVar("S", bound=Section)


class Key(NamedTuple):
    """One setting, as `--help` shows it."""

    path: str
    type_name: str
    default: str
    description: str


def convert(cls: type[S], tree: Tree, path: str = "") -> S:
    """Turn a parsed TOML tree into the typed section `cls`, or raise `ConfigError`.

    `path` is the dotted place of `tree` in the whole configuration, for messages.
    """
    if not isinstance(tree, dict):  # an override such as "--train 5" puts a value in a table's place
        raise ConfigError(f"{path} = {tree!r}: expected a table of settings")
    _refuse_unknown(cls, tree, path)
    try:
        section = msgspec.convert(tree, cls, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), cls, tree, path)) from None
    _check_all(section, f"{path}." if path else "")
    return section


def load_toml(path: Path) -> Tree:
    """Read a TOML file. Raises `ConfigError` where it is missing or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML config, such as configs/tiny.toml") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def apply_overrides(tree: Tree, arguments: Sequence[str], texts: Collection[str] = ()) -> Tree:
    """Return `tree` with ``--a.b value`` and ``--a.b=value`` laid over it.

    Values are TOML literals (``3``, ``1e-3``, ``true``, ``[1, 2]``); anything else is taken as a string. `texts` are
    keys that hold text, and whose numbers are text too (a run named 2024).
    """
    result = _deep_copy(tree)
    for key, text in _pairs(arguments):
        *tables, leaf = key.split(".")
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--{key}: {table} is a value, not a table")
        value = _literal(text)
        place[leaf] = text if key in texts and isinstance(value, bool | int | float) else value
    return result


def dump_toml(tree: Mapping[str, Any]) -> str:
    """Write nested plain values as TOML; what `tomllib` reads back is equal. None is left out: TOML has no null."""
    lines: list[str] = []
    _dump_table(tree, "", lines)
    return "\n".join(lines).strip() + "\n"


def describe(cls: type[Section], path: str = "") -> list[Key]:
    """Every setting under `cls`, depth first: its dotted key, type, default and description."""
    keys: list[Key] = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        key = f"{path}.{field.encode_name}" if path else field.encode_name
        inner, description = _unwrap(hints[field.name])
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += describe(inner, key)
            continue
        keys.append(Key(key, _type_name(inner), _default_text(field), description))
    return keys


def _check_all(section: Section, prefix: str) -> None:
    for field in msgspec.structs.fields(type(section)):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            _check_all(value, f"{prefix}{field.encode_name}.")
    section.check(prefix)


def _refuse_unknown(cls: type[Section], tree: Tree, path: str) -> None:
    """Name an unknown key with its full path and its nearest relative; msgspec alone would say only the key."""
    hints = typing.get_type_hints(cls)
    known = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(cls)}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            shown = "" if isinstance(value, dict) else f" = {value!r}"
            raise ConfigError(f"{full}{shown}: unknown key; {hint}")
        inner = _section_in(known[key])
        if inner is None:
            continue
        for place, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, dict):
                _refuse_unknown(inner, item, full if place is None else f"{full}[{place}]")


def _section_in(hint: Any) -> type[Section] | None:
    """The `Section` that a field holds: itself, in a union, or in a sequence."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint
    found = (_section_in(part) for part in typing.get_args(hint))
    return next((section for section in found if section is not None), None)


def _explain(message: str, cls: type[Section], tree: Tree, path: str) -> str:
    """Put key and value before msgspec's "Expected `int` >= 1 - at `$.train.steps`"."""
    match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", message, re.DOTALL)
    assert match is not None
    expectation, place = match.group(1), match.group(2) or ""
    full = ".".join(part for part in (path, place) if part)
    value = _lookup(tree, place)
    shown = "" if value is None or isinstance(value, dict) else f" = {json.dumps(value, default=str)}"
    expectation = (expectation[0].lower() + expectation[1:]).replace(" | null", "")
    if expectation.startswith("invalid enum value"):
        expectation = f"expected one of {', '.join(_choices(cls, place))}"
    if re.fullmatch(r"expected `str`, got `(int|float)`", expectation):
        expectation += "; write it in quotes, and a quantity with its unit, such as '300 Mbit/s' or '25 ms'"
    return f"{full or 'config'}{shown}: {expectation}"


def _choices(cls: type[Section], place: str) -> list[str]:
    """The values of the `Literal` at `place`, which leads through sections only."""
    hint: Any = cls
    for part in re.findall(r"[^.\[\]]+", re.sub(r"\[\d*\.*\]", "", place)):
        section = _section_in(hint)
        assert section is not None
        names = {field.encode_name: field.name for field in msgspec.structs.fields(section)}
        hint = typing.get_type_hints(section)[names[part]]
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return [repr(value) for literal in literals for value in typing.get_args(literal)]


def _lookup(tree: Any, place: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", place):
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word!r}: expected --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"--{key}: a value is missing; write --{key} VALUE")
            text = following
        yield key, text


def _literal(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A name may look like a date, or hold a line break; no setting is either.
    value = tree["value"]
    return value if len(tree) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _deep_copy(tree: Tree) -> Tree:
    return {key: _deep_copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _dump_table(table: Mapping[str, Any], path: str, lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    nested = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    if path and (plain or not nested):
        lines.append(f"\n[{path}]")
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in nested.items():
        _dump_table(value, f"{path}.{_key(key)}" if path else _key(key), lines)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"{type(value).__name__} has no TOML form")


def _string(text: str) -> str:
    """A basic string; TOML forbids one character more than JSON to stand for itself."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _unwrap(hint: Any) -> tuple[Any, str]:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *metas = typing.get_args(hint)
        texts = [meta.description for meta in metas if isinstance(meta, msgspec.Meta) and meta.description]
        return inner, " ".join(texts)
    return hint, ""


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "")
    return getattr(hint, "__name__", str(hint))


def _default_text(field: msgspec.structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return "" if field.default is None else _value(field.default)
    if field.default_factory is not msgspec.NODEFAULT:
        made = field.default_factory()
        return _value(made) if isinstance(made, list | dict | tuple) else str(made)
    return "required"
