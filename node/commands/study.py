"""`isthmus study`: run a named study, or what is left of it, and write its table, picture and raw figures."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netem.config import dump_toml
from netem.errors import ConfigError
from node.config.tree import public_tree
from node.lab.study.plan import Run, plan, read_result
from node.lab.study.pool import run_all
from node.lab.study.table import Study, load_study, study_names

log = logging.getLogger("isthmus.study")

RESULTS = Path("outputs/study")
SPECTRUM = "spectrum"


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    name: str
    base: str  # empty: the study's own
    seeds: int
    jobs: int  # 0: the cores of this machine
    out: Path
    overrides: tuple[str, ...]
    preset: str = ""

    @property
    def stem(self) -> str:
        """Name of the files: the study's, with the base where that is not its own."""
        return f"{self.name}-{self.base}" if self.base else self.name

    @property
    def command(self) -> str:
        """The line that makes the same figures again."""
        base = ("--base", self.base) if self.base else ()
        preset = ("--preset", self.preset) if self.preset else ()
        return shlex.join(["isthmus", "study", self.name, *base, *preset, "--seeds", str(self.seeds), *self.overrides])


def run_study(wish: Wish) -> Path:
    """Run and write; the Markdown's path. Raises `ConfigError` before anything runs where an arm is no config."""
    from node.data import open_data

    for key, value, least in (("--seeds", wish.seeds, 1), ("--jobs", wish.jobs, 0)):
        if value < least:
            raise ConfigError(f"{key} {value}: expected {least} or more")
    study = load_study(wish.name, wish.base, wish.overrides, wish.preset)
    runs = plan(study, wish.seeds)
    _check(study)
    for data in {arm.config.data for arm in study.arms}:
        open_data(data)  # tokenised once, before several processes want it
    run_all(runs, RESULTS, wish.jobs or os.cpu_count() or 1)
    return _write(wish, study, runs)


def show_studies() -> None:
    """List the studies there are."""
    names = study_names()
    width = max(map(len, names))
    for name in names:
        study = load_study(name)
        print(f"  {name:{width}}  {study.title} ({len(study.arms)} arms on {study.base})")


def print_study(name: str, base: str, overrides: Sequence[str], preset: str) -> str:
    """The resolved config of every arm, as TOML: [arms.NAME.train] and so on. Raises `ConfigError`."""
    if not name:
        raise ConfigError("NAME: name a study; `isthmus study` lists them")
    study = load_study(name, base, overrides, preset)
    return dump_toml({"arms": {arm.name: public_tree(arm.config) for arm in study.arms}})


def show_checkpoint(folder: Path) -> None:
    """The stable ranks of a Hugging Face folder."""
    from node.lab.study.spectrum import checkpoint_ranks, checkpoint_table

    print(checkpoint_table(checkpoint_ranks(folder)))


def _check(study: Study) -> None:
    """Faults that only the payloads' shapes show."""
    from node.exchange.payload import PayloadFormat

    for arm in study.arms:
        try:
            PayloadFormat(arm.config)
        except ConfigError as error:
            raise ConfigError(f"study {study.name}, arm {arm.name!r}: {error}") from None


def _write(wish: Wish, study: Study, runs: Sequence[Run]) -> Path:
    from node.lab.study.document import document, raw, write
    from node.lab.study.figures import figures
    from node.lab.study.picture import draw
    from node.lab.study.spectrum import layer_table, training_table

    results = {arm.name: [_result(run) for run in runs if run.arm == arm.name] for arm in study.arms}
    text = document(study, figures(study, results), results, wish.command, wish.stem)
    if study.name == SPECTRUM:
        parts = [
            "## Over training, mean over layers",
            training_table(results),
            "## After training",
            layer_table(results),
        ]
        text += "\n" + "\n\n".join(parts) + "\n"
    draw(study, results, wish.out / f"{wish.stem}.png")
    write(wish.out / f"{wish.stem}.jsonl", raw(results))
    return write(wish.out / f"{wish.stem}.md", text)


def _result(run: Run) -> dict[str, object]:
    result = read_result(RESULTS, run)
    assert result is not None, f"{run.label} has been run"
    return result
