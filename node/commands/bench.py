"""`isthmus bench`: Isthmus and its peers on one wire that the kernel shapes, as a page, a picture and raw figures.

It writes bench.json, bench.md and bench.png into `out`. Configs, logs and runs go to a folder below outputs/.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from coordinator.records.folder import make_folder
from netem.errors import ConfigError
from netem.units import parse_rate
from netem.verify.kernel import unavailable
from node.commands.node import interrupt
from node.commands.run import check_corpus
from node.commands.written import write_text
from node.config import load_config

log = logging.getLogger("isthmus.bench")

RESULTS = Path("outputs/bench")


@dataclass(frozen=True)
class Wish:
    """The options of the command line."""

    config: Path
    nodes: int
    rate: str
    quick: bool
    out: Path
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line that makes the same again."""
        quick = ["--quick"] if self.quick else []
        asked = ["--nodes", str(self.nodes), "--rate", self.rate, *quick, "--out", str(self.out)]
        return shlex.join(["isthmus", "bench", str(self.config), *self.overrides, *asked])


def bench(wish: Wish) -> None:
    """Measure, and write the page. Where the wire cannot be had here, say why and do nothing."""
    from node.lab.bench.measure import common_settings, measure, plan
    from node.lab.bench.page import Facts, as_object, document
    from node.lab.bench.picture import draw
    from node.lab.study.trial import host_line
    from node.lab.tunnel.page import shape_line

    rate_bps = parse_rate(wish.rate, "--rate")
    if rate_bps is None:
        raise ConfigError(f"--rate {wish.rate!r}: expected a limit, such as '300 Mbit/s'")
    if wish.nodes < 2:
        raise ConfigError(f"--nodes {wish.nodes}: expected 2 or more; one node sends nothing")
    wanted = plan(wish.config, wish.overrides, wish.nodes, rate_bps, wish.quick)
    config = load_config(wish.config, common_settings(wanted, wish.nodes))
    check_corpus(config)
    if reason := unavailable():
        print(f"skipped:     {reason}")
        return
    make_folder(RESULTS)
    signal.signal(signal.SIGTERM, interrupt)
    found = measure(wanted, RESULTS, lambda text: log.info("%s", text))
    facts = Facts(wish.command, host_line(), shape_line(config), date.today().isoformat())
    write_text(wish.out / "bench.json", json.dumps(as_object(facts, wanted, found), indent=1) + "\n", "--out")
    page = document(facts, wanted, found)
    write_text(wish.out / "bench.md", page, "--out")
    draw(wanted, found, wish.out / "bench.png")
    print(page)
    print(f"everything:  {wish.out}/bench.md, bench.json, bench.png")
