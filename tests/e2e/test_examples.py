"""The scripts in examples/, as a newcomer runs them: they end in seconds, without a warning, and say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.isthmus_runs import environment

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def output_of(name: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}"],
        cwd=ROOT,
        env=environment(cache) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def test_a_link_is_as_slow_as_arithmetic_says(cache: Path) -> None:
    text = output_of("shape_a_link.py", cache)
    expected_ms = number(text, r"arithmetic +([\d.]+) ms")
    assert expected_ms == pytest.approx(8 * 8e6 / 300e6 * 1e3 + 25, abs=0.1)
    # A busy host may be late, and nothing may be early.
    assert expected_ms - 1 < number(text, r"measured +([\d.]+) ms") < 2 * expected_ms
    assert 8_000_000 < number(text, r"on the wire ([\d,]+)") < 8_000_000 * 1.01


def test_keys_keep_their_energy(cache: Path) -> None:
    text = output_of("compress_keys.py", cache)
    assert number(text, r"saved +([\d.]+)%") == pytest.approx(93.75, abs=0.02)
    kept, possible = number(text, r"kept +([\d.]+)%"), number(text, r"basis +([\d.]+)%")
    assert 90 < possible < 99
    assert kept == pytest.approx(possible, abs=0.02)  # untrained, nothing is turned: the basis alone decides


def test_four_nodes_have_the_losses_of_one(cache: Path) -> None:
    rows = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+) +\S+$", output_of("train_in_process.py", cache), re.MULTILINE)
    assert len(rows) == 8
    one, four = ([float(row[column]) for row in rows] for column in (0, 1))
    assert four == pytest.approx(one, rel=2e-6)
    assert one[-1] < one[0] - 0.2


def test_every_example_is_tested_and_short() -> None:
    text = Path(__file__).read_text()
    assert len(EXAMPLES) == 3
    for name in EXAMPLES:
        assert f'output_of("{name}"' in text
        assert len((ROOT / "examples" / name).read_text().splitlines()) < 80, name
