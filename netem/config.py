"""Typed configuration: strict sections that are read from TOML and overridden from the command line.

This is the machinery only. Each component owns its own `Section` (`NetConfig` in `netem.profile`,
`CoordinatorConfig` in `coordinator.config`, the rest and the whole tree in `node.config`).
Every mistake becomes one `ConfigError` line with the key, the value and what was expected.
"""

from __future__ import annotations

import difflib
import functools
import math
import tomllib
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import tomli_w

from netem.errors import ConfigError
from netem.explain import choices_of, explain, kind_name, show, struct_in

Tree = dict[str, Any]

MOST_INT = (1 << 63) - 1
"""The largest whole number that a setting may have; a setting's own bound may be lower."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the configuration. Types and bounds are in the annotations; `check` holds what they cannot say."""

    def check(self, path: str) -> None:
        """Raise `ConfigError` where the values, each legal, do not fit together. `path` prefixes keys: "model."."""


S = TypeVar("S", bound=Section)


class Key(NamedTuple):
    """One setting, as `isthmus settings` shows it."""

    path: str
    type_name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()
    """All values there are, where they can be counted."""


def convert(cls: type[S], tree: Tree, path: str = "") -> S:
    """Turn a parsed TOML tree into the typed section `cls`, or raise `ConfigError`.

    `path` is the dotted place of `tree` in the whole configuration, for messages.
    """
    if not isinstance(tree, dict):  # an override such as "--train 5" puts a value in a table's place
        raise ConfigError(f"{path} = {show(tree)}: expected a table of settings")
    _refuse_unknown(cls, tree, path)
    try:
        section = msgspec.convert(tree, cls, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(str(error), cls, tree, path)) from None
    _check_all(section, f"{path}." if path else "")
    return section


def load_toml(path: Path) -> Tree:
    """Read a TOML file, with a byte-order mark or without. Raises `ConfigError` where it is missing or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML config, such as configs/tiny.toml") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None


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


def merge(below: Tree, above: Tree) -> Tree:
    """`above` laid over `below`, table by table."""
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        merged[key] = merge(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def flat(tree: Tree, path: str = "") -> dict[str, Any]:
    """The values of nested tables, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = f"{path}{key}"
        found |= flat(value, f"{inner}.") if isinstance(value, dict) else {inner: value}
    return found


def dump_toml(tree: Mapping[str, Any]) -> str:
    """Write nested plain values as TOML; what `tomllib` reads back is equal. None is left out: TOML has no null."""
    return tomli_w.dumps(_without_none(tree))


def toml_value(value: Any) -> str:
    """One value as TOML writes it, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml_value(inner)}' for key, inner in value.items())} }}" if value else "{}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


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
        keys.append(Key(key, kind_name(inner), _default_text(field), description, choices_of(inner)))
    return keys


def user_path(text: str, key: str) -> Path:
    """The path that a setting gives, with ~ and ~user expanded. Raises `ConfigError` where there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} = {text!r}: this user has no home folder; give a full path") from None


def _check_all(section: Section, prefix: str) -> None:
    for name, key in zip(section.__struct_fields__, section.__struct_encode_fields__, strict=True):
        _check_value(getattr(section, name), f"{prefix}{key}")
    section.check(prefix)


def _check_value(value: Any, key: str) -> None:
    """Check the sections in `value`, and that numbers are finite: types and bounds let inf pass."""
    if isinstance(value, Section):
        _check_all(value, f"{key}.")
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            _check_value(item, f"{key}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value}: expected a finite number")
    elif isinstance(value, int) and abs(value) > MOST_INT:
        raise ConfigError(f"{key} = {value}: expected a whole number of at most {MOST_INT}")


def _refuse_unknown(cls: type[Section], tree: Tree, path: str) -> None:
    """Name an unknown key with its full path and its nearest relative; msgspec alone would say only the key."""
    known = _types(cls)
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            shown = "" if isinstance(value, dict) else f" = {value!r}"
            raise ConfigError(f"{full}{shown}: unknown key; {hint}")
        inner = struct_in(known[key])
        if inner is None:
            continue
        for place, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, dict):
                _refuse_unknown(inner, item, full if place is None else f"{full}[{place}]")


@functools.cache
def _types(cls: type[Section]) -> Mapping[str, Any]:
    """The type of each key. Python evaluates annotations anew at each question, which takes milliseconds."""
    hints = typing.get_type_hints(cls)
    return {key: hints[name] for name, key in zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True)}


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word!r}: expected --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{key}: a value is missing; write --{key} VALUE")
            text = following
        yield key, text


def _literal(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    # A name may look like a date, or hold a line break; no setting is either.
    value = tree["value"]
    return value if len(tree) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _deep_copy(tree: Tree) -> Tree:
    return {key: _deep_copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _unwrap(hint: Any) -> tuple[Any, str]:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *metas = typing.get_args(hint)
        texts = [meta.description for meta in metas if isinstance(meta, msgspec.Meta) and meta.description]
        return inner, " ".join(texts)
    return hint, ""


def _default_text(field: msgspec.structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return "" if field.default is None else toml_value(field.default)
    if field.default_factory is not msgspec.NODEFAULT:
        made = field.default_factory()
        return toml_value(made) if isinstance(made, list | dict | tuple) else str(made)
    return "required"
