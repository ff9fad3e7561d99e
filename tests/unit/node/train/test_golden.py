"""Losses and gradients of small fixed runs, kept as figures: a change that should not change numbers leaves them alone.

`python tests/golden/write.py` writes `tests/golden/figures.json` anew; a commit that does so says why. Figures are
compared to the last bit on a processor of the kind that wrote them, since sums of floats depend on its vector units,
and to 1e-5 elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.goldens import CASES, FIGURES, figures_of, processor

KEPT: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_that_were_kept(case: str, tmp_path: Path) -> None:
    kept, found = KEPT["cases"][case], figures_of(case, tmp_path)
    assert found["losses"] == pytest.approx(kept["losses"], rel=1e-5)
    assert found["gradient_norms"] == pytest.approx(kept["gradient_norms"], rel=1e-4)
    if processor() == KEPT["processor"]:
        assert found == kept


def test_no_figure_is_kept_of_a_case_that_is_gone() -> None:
    assert set(KEPT["cases"]) == set(CASES)
