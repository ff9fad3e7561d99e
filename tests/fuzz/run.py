"""Fuzzes one target with atheris, guided by coverage: new inputs are kept in the corpus.

    pip install atheris
    python tests/fuzz/run.py frame --runs 1000000

A crash is written to `crash-…` in this folder, and ends the command with a traceback. The corpus lies in
tests/fuzz/corpus/TARGET; the suite runs every target over it (tests/unit/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]


def main() -> None:
    import atheris  # not needed for anything else

    with atheris.instrument_imports(include=["netem", "coordinator", "node.exchange"]):
        from fuzz.targets import EXAMPLES, TARGETS, driven

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000, help="executions (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=0, help="end after this time; 0: after --runs")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus", help="folder of all corpora (%(default)s)")
    options = parser.parse_args()
    corpus = options.corpus / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(EXAMPLES[options.target]):
        (corpus / f"example-{number}").write_bytes(b"\1" + example)
        (corpus / f"damage-{number}").write_bytes(bytes([2 * number, 0, 20, 1, 3]))
    flags = [f"-runs={options.runs}", "-max_len=4096", "-rss_limit_mb=2048", f"-artifact_prefix={HERE}/crash-"]
    if options.seconds:
        flags.append(f"-max_total_time={options.seconds}")
    atheris.Setup([sys.argv[0], *flags, "-print_final_stats=1", str(corpus)], driven(options.target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
