"""What the package offers to others: the names that `__init__` calls public, and what the wheel contains."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import hatchling.build
import jsonschema
import pytest
import yaml
from helpers import ROOT

PACKAGES = ("netem", "coordinator", "node")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLIC = re.compile(r"^- ((?:`[\w.]+`(?:, )?)+):", re.MULTILINE)


def public_names(package: str) -> list[str]:
    doc = importlib.import_module(package).__doc__ or ""
    return [name for line in PUBLIC.findall(doc) for name in re.findall(r"[\w.]+", line)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_called_public_exists_and_is_documented(package: str) -> None:
    names = public_names(package)
    assert len(names) > 3
    for name in names:
        assert name.startswith(package + ".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
        assert found.__doc__, name


def test_importing_a_package_imports_no_torch() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as `pip` would have it built, without its environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / hatchling.build.build_wheel(str(folder)))


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    for name in (
        *(f"{package}/py.typed" for package in PACKAGES),
        *("node/data/embedded/NOTICE.md", "node/data/embedded/novels.jsonl.xz", "node/data/embedded/gpt2-vocab.bpe.xz"),
        *("netem/profiles/internet-300mbps.toml", "node/config/presets/paper.toml"),
        "node/lab/study/tables/control.toml",
    ):
        assert name in files, name


def test_the_wheel_carries_the_license_and_the_notices(wheel: zipfile.ZipFile) -> None:
    info = f"isthmus-{PROJECT['version']}.dist-info"
    for name in ("LICENSE", "NOTICE"):
        assert wheel.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()
    notice = (ROOT / "NOTICE").read_text()
    for name in re.findall(r"`([\w.-]+\.xz)`", (ROOT / "node/data/embedded/NOTICE.md").read_text()):
        assert name in notice
    assert "Copyright (c) 2019 OpenAI" in notice
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    assert "isthmus = node.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_image_builds_the_wheel_from_all_that_it_needs() -> None:
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1]
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", stage, re.MULTILINE) for word in line.split()}
    assert copied == {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *PACKAGES}


def test_the_citation_agrees_with_the_project() -> None:
    """The part of the Citation File Format's schema (1.2.0) that we use."""
    person = {"type": "object", "required": ["family-names", "given-names"]}
    schema = {
        "type": "object",
        "required": ["cff-version", "message", "title", "authors", "license", "version", "references"],
        "properties": {
            "cff-version": {"const": "1.2.0"},
            "type": {"enum": ["software", "dataset"]},
            "authors": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}},
            "version": {"const": PROJECT["version"]},
            "license": {"const": PROJECT["license"]},
            "references": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type", "title", "authors", "url", "year"],
                    "properties": {
                        "authors": {"type": "array", "minItems": 1, "items": person},
                        "url": {"const": PROJECT["urls"]["Paper"]},
                    },
                },
            },
        },
    }
    jsonschema.validate(json.loads(json.dumps(yaml.safe_load((ROOT / "CITATION.cff").read_text()))), schema)


def test_the_workflow_runs_what_anybody_can_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["check-and-test"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert job["strategy"]["matrix"]["python"][0] == PROJECT["requires-python"].removeprefix(">=")
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
