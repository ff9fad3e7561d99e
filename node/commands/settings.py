"""`isthmus settings`: the presets, then every setting with its default and its meaning."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from netem.config import Key, describe, flat, toml_value
from netem.errors import ConfigError
from node.config import Config
from node.config.presets import Preset, load_preset, preset_names

_PRESETS = """\
A preset is a set of settings with a purpose. Choose one with --preset NAME, or with preset = "NAME" at the top of the
config file, and then change what you like. What comes later in this order takes precedence:
  defaults < preset < config file < command line
`isthmus settings --preset NAME` shows what a preset sets.
"""


def show_settings(section: str, preset: str) -> None:
    """Print all of it, or one section, or what one preset sets. Raises `ConfigError` for a name that there is not."""
    keys = describe(Config)
    sections = sorted({_section(key) for key in keys})
    if section and section not in sections:
        raise ConfigError(f"{section}: no such section; there are {', '.join(sections)}")
    keys = [key for key in keys if section in ("", _section(key))]
    if preset:
        _show_preset(load_preset(preset), keys)
        return
    if not section:
        _show_presets()
    _show_keys(keys)


def _show_presets() -> None:
    print(f"{_PRESETS}\npresets:")
    presets = [load_preset(name) for name in preset_names()]
    width = max(len(preset.name) for preset in presets)
    for preset in presets:
        print("\n".join(_indented(f"{preset.name:{width}}  ", preset.purpose)))


def _show_preset(preset: Preset, keys: list[Key]) -> None:
    print("\n".join(textwrap.wrap(preset.purpose, _width())))
    values = {path: toml_value(value) for path, value in flat(preset.tree).items()}
    keys = [key for key in keys if key.path in values]
    path_width = max((len(key.path) for key in keys), default=0)
    value_width = max((len(values[key.path]) for key in keys), default=0)
    section = ""
    for key in keys:
        if _section(key) != section:
            section = _section(key)
            print(f"\n[{section}]")
        value = values[key.path]
        note = "the default" if value == key.default else f"default: {key.default or '(none)'}"
        print(f"  {key.path:{path_width}}  {value:{value_width}}  {note}")


def _show_keys(keys: list[Key]) -> None:
    width = max(len(key.path) for key in keys)
    section = ""
    for key in keys:
        if _section(key) != section:
            section = _section(key)
            print(f"\n[{section}]")
        print(f"  {key.path:{width}}  {key.default or '(none)'}")
        print("\n".join(_indented(f"{'':{width}}  ", f"{key.description} ({key.type_name})")))


def _indented(first: str, text: str) -> Iterator[str]:
    return iter(textwrap.wrap(text, _width(), initial_indent=f"  {first}", subsequent_indent=" " * (len(first) + 2)))


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size((120, 24)).columns))


def _section(key: Key) -> str:
    return key.path.partition(".")[0]
