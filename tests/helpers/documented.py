"""Commands that documents show: found in them, and checked as far as that is possible without running them.

A command is a line of a fenced block marked `sh`, an indented line, or inline code, if it begins with the name of a
program below. Words in capitals (NAME, FOLDER) stand for something that the reader fills in.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from helpers import ROOT
from node.cli import main
from node.options import parse

PROGRAMS = ("isthmus", "make", "pytest", "python")
_INLINE = re.compile(rf"(?<!`)`((?:{'|'.join(PROGRAMS)}) [^`]+)`")
_INDENTED = re.compile(rf" {{4}}((?:{'|'.join(PROGRAMS)}) .*)")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+")


def fenced(text: str) -> list[str]:
    """Lines of the fenced blocks marked `sh`, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.join(words) for block in blocks for line in block.splitlines() if (words := _words(line))]


def commands_of(text: str) -> list[str]:
    """Every command that a document shows."""
    others = [*_INLINE.findall(text), *(found[1] for line in text.splitlines() if (found := _INDENTED.fullmatch(line)))]
    return [*fenced(text), *(shlex.join(_words(line)) for line in others)]


def check(command: str) -> None:
    """Fail where the command could not be run as it stands: a wrong option, a setting or a file that there is not."""
    words = shlex.split(command)
    program, arguments = words[0], words[1:]
    if program == "isthmus":
        _check_isthmus(arguments)
    elif program == "make":
        for line in made_by(arguments):
            check(line)
    elif program == "pytest":
        _check_pytest(arguments)
    elif program == "python":
        _check_python(arguments)
    elif program == "torchrun":
        check(shlex.join(words[words.index("isthmus") :]))
    else:
        assert program == "export", command


def made_by(arguments: Sequence[str]) -> list[str]:
    """The commands of ours that `make` would run, by its own account."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("\\\n", " ")
    lines = [line.strip().removeprefix(".venv/bin/") for line in text.splitlines() if line.startswith(".venv/bin/")]
    return [line for line in lines if line.startswith(PROGRAMS) and not line.startswith("python -m pip")]


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def _check_isthmus(arguments: list[str]) -> None:
    if all(word.isalpha() for word in arguments) and "study" not in arguments:
        _check_name(arguments)  # a command that is only named, as in "see `isthmus plan`"
        return
    options, settings = parse(arguments)
    if any(_PLACEHOLDER.fullmatch(word) for word in arguments):
        return
    profiles = getattr(options, "profile", None) or []
    for profile in profiles:
        assert main(["plan", "configs/tiny.toml", "--net", profile, "--print-config"]) == 0
    if hasattr(options, "print_config") and not hasattr(options, "checkpoint"):
        assert main([*arguments, "--print-config"]) == 0, arguments
    elif getattr(options, "redraw", False):
        assert not options.name or (ROOT / "docs" / "study" / f"{options.name}.jsonl").exists(), options.name
    elif options.command == "study" and options.name:
        assert main([*arguments, "--print-config"]) == 0, arguments
    elif settings:
        assert main(["plan", "configs/tiny.toml", *settings, "--print-config"]) == 0, arguments


def _check_name(arguments: list[str]) -> None:
    with redirect_stdout(StringIO()), pytest.raises(SystemExit) as end:
        parse([*arguments, "--help"])
    assert end.value.code == 0, arguments


def _check_pytest(arguments: list[str]) -> None:
    paths = [ROOT / word.split("::")[0] for word in arguments if word.startswith("tests/")]
    for path in paths:
        assert path.exists(), path
    if "-k" in arguments and paths:
        wanted = arguments[arguments.index("-k") + 1]
        names = "".join(file.stem + file.read_text() for path in paths for file in _files(path))
        assert wanted in names, f"no test is named after {wanted!r}"


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found is not None, arguments[1]
        source, rest = Path(str(found.origin)), arguments[2:]
    else:
        source, rest = ROOT / arguments[0], arguments[1:]
    text = source.read_text()
    assert "__main__" in text, f"{source} is no script"
    for option in (word for word in rest if word.startswith("--")):
        assert f'"{option}"' in text, f"{source} has no {option}"


def _files(path: Path) -> Iterator[Path]:
    yield from path.rglob("*.py") if path.is_dir() else [path]
