"""Messages for values that are of the wrong kind or out of bounds, in words for people.

msgspec checks a config against its types and says "Expected `int` >= 1 - at `$.train.steps`". `explain` makes of it
"train.steps = 0: expected a whole number of at least 1".
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any

import msgspec

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "a table of settings",
}
_BOUNDS = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}
_QUOTES = "write it in quotes, and a quantity with its unit, such as '300 Mbit/s' or '25 ms'"


def explain(message: str, cls: type[Any], tree: Any, path: str) -> str:
    """One line for the message of a `msgspec.ValidationError`: the key, its value, and what was expected.

    `cls` is the section that `tree` was read as, and `path` the dotted place of `tree` in the whole configuration.
    """
    match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", message, re.DOTALL)
    assert match is not None
    expectation, place = match.group(1), match.group(2) or ""
    full = ".".join(part for part in (path, place) if part)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", expectation):
        return f"{'.'.join(part for part in (full, missing.group(1)) if part)}: is missing, and has no default"
    value = _lookup(tree, place)
    shown = "" if value is None or isinstance(value, dict) else f" = {show(value)}"
    if expectation.startswith("Invalid enum value"):
        expectation = f"expected one of {', '.join(_choices(cls, place))}"
    return f"{full or 'config'}{shown}: {_in_words(expectation)}"


def show(value: Any) -> str:
    """A value as a message shows it: text in quotes, numbers as they are."""
    return repr(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)


def kind_name(hint: Any) -> str:
    """The type of a setting in words: "whole number", "text or table of settings", "dense or local"."""
    if typing.get_origin(hint) is typing.Annotated:
        return kind_name(typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(kind_name(part) for part in typing.get_args(hint) if part is not type(None))
    kind = getattr(typing.get_origin(hint) or hint, "__name__", "")
    name = _KINDS.get({"list": "array", "tuple": "array"}.get(kind, kind), _KINDS["object"])
    return name.removeprefix("a ")


def choices_of(hint: Any) -> tuple[str, ...]:
    """All values of a setting, as they are written on the command line; none where they cannot be counted."""
    if hint is bool:
        return "true", "false"
    return tuple(str(value) for literal in _literals(hint) for value in typing.get_args(literal))


def _in_words(expectation: str) -> str:
    if expectation == "Number out of range":
        return "expected a smaller number"
    match = re.fullmatch(
        r"Expected `([a-z |]+)`"
        r"(?: of length (?P<long>>=|<=)? ?(?P<length>\d+))?"
        r"(?: (?P<bound>[<>]=?) (?P<limit>\S+))?"
        r"(?:, got `?(?P<got>\w+)`?)?",
        expectation,
    )
    if match is None:
        return expectation[0].lower() + expectation[1:]
    kinds = [kind for kind in match.group(1).split(" | ") if kind != "null"]
    text = "expected " + " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    if match["bound"]:
        text += f" {_BOUNDS[match['bound']]} {match['limit'].removesuffix('.0')}"
    if match["length"]:
        text += _length(kinds[0], match["long"], int(match["length"]))
    if match["got"]:
        text += f", not {_KINDS.get(match['got'], match['got'])}"
    return f"{text}; {_QUOTES}" if kinds == ["str"] and match["got"] in ("int", "float") else text


def _length(kind: str, bound: str | None, length: int) -> str:
    if bound == ">=" and length == 1:
        return " that is not empty"
    what = "characters" if kind == "str" else "values"
    return f" of {_BOUNDS[bound].removeprefix('of ') + ' ' if bound else ''}{length} {what}"


def _choices(cls: type[Any], place: str) -> list[str]:
    """The values of the `Literal` at `place`, which leads through sections only."""
    hint: Any = cls
    for part in re.findall(r"[^.\[\]]+", re.sub(r"\[\d*\.*\]", "", place)):
        section = struct_in(hint)
        assert section is not None
        names = {field.encode_name: field.name for field in msgspec.structs.fields(section)}
        hint = typing.get_type_hints(section)[names[part]]
    return [repr(value) for literal in _literals(hint) for value in typing.get_args(literal)]


def _literals(hint: Any) -> list[Any]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [part for part in parts if typing.get_origin(part) is typing.Literal]


def struct_in(hint: Any) -> Any:
    """The `msgspec.Struct` that a field holds: itself, in a union, or in a sequence. None where there is none."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    found = (struct_in(part) for part in typing.get_args(hint))
    return next((section for section in found if section is not None), None)


def _lookup(tree: Any, place: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", place):
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree
