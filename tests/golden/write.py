"""Write `figures.json` anew: `python tests/golden/write.py`. A commit that changes the figures says why."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.goldens import CASES, FIGURES, figures_of, processor


def main() -> None:
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = figures_of(name, Path(folder))
        print(name, found[name]["losses"])
    text = json.dumps({"processor": processor(), "cases": found}, indent=1)
    FIGURES.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
