"""A study on disk: pages and pictures are made from it alone, and what is no such file is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT

from netem.errors import ConfigError
from node.cli import main
from node.lab.study.document import document
from node.lab.study.figures import figures
from node.lab.study.record import Recipe, read_record, record_text

PAGES = ROOT / "docs" / "study"
KEPT = sorted(PAGES.glob("*.jsonl"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_pages_that_are_kept_are_those_that_the_command_makes(path: Path) -> None:
    recipe, study, results = read_record(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == document(
        recipe, study, figures(study, results), results
    )
    assert path.with_suffix(".png").exists()
    assert path.stem == recipe.stem


def test_what_is_read_is_what_was_written() -> None:
    path = PAGES / "spectrum.jsonl"
    recipe, _, results = read_record(path)
    assert record_text(recipe, results) == path.read_text(encoding="utf-8")


def test_redraw_makes_a_page_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spectrum.jsonl").write_bytes((PAGES / "spectrum.jsonl").read_bytes())
    assert main(["study", "--redraw", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"study:       {tmp_path / 'spectrum.md'}\n"
    assert (tmp_path / "spectrum.md").read_bytes() == (PAGES / "spectrum.md").read_bytes()
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def lines_of(name: str) -> list[str]:
    return (PAGES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def without_arm(lines: list[str], arm: str) -> list[str]:
    return [line for line in lines if json.loads(line).get("arm") != arm]


def changed(line: str, section: str, key: str, value: object) -> str:
    tree = json.loads(line)
    tree["config"][section][key] = value
    return json.dumps(tree)


SPECTRUM = lines_of("spectrum")


def test_a_preset_is_part_of_the_command_and_of_the_file() -> None:
    recipe = Recipe("control", "recall", 2, ("--train.steps", "9"), "exact")
    assert recipe.command == "isthmus study control --base recall --preset exact --seeds 2 --train.steps 9"
    assert json.loads(record_text(recipe, {}))["preset"] == "exact"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "line 1: expected what study this is"),
        (b"\xff\xfe\x00\n", "line 1: expected what study this is"),
        (b"[" * 100_000, "line 1: expected what study this is"),
        (SPECTRUM[1].encode(), "line 1: expected what study this is"),
        (SPECTRUM[0].encode() + b"\n[1]\n", "line 2: expected a run of a study"),
        (SPECTRUM[0].encode() + b'\n{"arm": "\xff"}\n', "line 2: expected a run of a study"),
        ("\n".join([*SPECTRUM[:-1], SPECTRUM[-1][:-30]]).encode(), f"line {len(SPECTRUM)}: expected a run of a study"),
        (SPECTRUM[0].replace("spectrum", "none").encode() + b"\n", "none: no such study"),
        ("\n".join(without_arm(SPECTRUM, "dense")).encode(), "holds no run of the arm 'dense'"),
        ("\n".join(SPECTRUM[:-1]).encode(), "should have the seeds 0 to 2"),
        (
            "\n".join([SPECTRUM[0], *(changed(line, "train", "steps", 20) for line in SPECTRUM[1:])]).encode(),
            "arm 'dense' was run with train.steps = 20, and the study now has 300",
        ),
    ],
)
def test_what_is_no_record_of_the_study_is_refused(text: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "spectrum.jsonl"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_record(path)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_arm_that_the_study_has_no_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spectrum.jsonl"
    path.write_text("\n".join(line.replace('"arm": "method"', '"arm": "magic"') for line in SPECTRUM), encoding="utf-8")
    with pytest.raises(ConfigError, match="arm 'magic' is not in the study spectrum"):
        read_record(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "nothing.jsonl: cannot be read"),
        ([], "holds no .jsonl file of a study"),
        (["control", "--train.steps", "3"], "--redraw: takes a study's name"),
    ],
)
def test_mistakes_with_redraw_are_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments, "--redraw", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
