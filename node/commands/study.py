"""`isthmus study`: run a named study, or the runs of it that are missing, and write its page, picture and raw figures.

With `--redraw` nothing is run: pages and pictures are made again from the figures that are kept beside them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netem.config import dump_toml, user_path
from netem.errors import ConfigError
from node.commands.written import write_text
from node.config.tree import public_tree
from node.lab.study.pool import run_all
from node.lab.study.record import Recipe, Results, kept_runs, read_record, record_text
from node.lab.study.runs import Run, from_trunks, read_result, runs_of
from node.lab.study.table import Study, load_study, study_names

RESULTS = Path("outputs/study")


@dataclass(frozen=True)
class Wish:
    """The options of the command line."""

    recipe: Recipe
    jobs: int
    """Runs at once; 0: as many as this machine has cores."""
    out: Path
    extend: bool = False
    """Keep the runs that the study's file holds, whatever code has made them, and run only the others."""


def run_study(wish: Wish) -> Path:
    """Run and write; the path of the page. Raises `ConfigError` before anything runs where an arm is no config."""
    from node.data import open_data

    recipe = wish.recipe
    for key, value, least in (("--seeds", recipe.seeds, 1), ("--jobs", wish.jobs, 0)):
        if value < least:
            raise ConfigError(f"{key} {value}: expected {least} or more")
    study = recipe.load()
    path = wish.out / f"{recipe.stem}.jsonl"
    kept = kept_runs(path, study) if wish.extend else {}
    trunks = {seed: str(result["trunk"]) for (_, seed), result in kept.items() if result.get("trunk")}
    runs = from_trunks(runs_of(study, recipe.seeds), trunks)
    _check(study)
    for data in {arm.config.data for arm in study.arms}:
        open_data(data)  # tokenised once, before several processes want it
    run_all([run for run in runs if (run.arm, run.seed) not in kept], RESULTS, wish.jobs or os.cpu_count() or 1)
    found = {(run.arm, run.seed): kept.get((run.arm, run.seed)) or _result(run) for run in runs}
    results = {arm.name: [found[run.arm, run.seed] for run in runs if run.arm == arm.name] for arm in study.arms}
    write_text(path, record_text(recipe, results), "--out")
    return _write_page(recipe, study, results, wish.out)


def redraw(stem: str, folder: Path) -> list[Path]:
    """Make the pages and pictures of a folder again from their .jsonl files, or only that called `stem`; their paths.

    Raises `ConfigError` where there are none, or where one cannot be read."""
    paths = [folder / f"{stem}.jsonl"] if stem else sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ConfigError(f"{folder}: holds no .jsonl file of a study; name another folder with --out")
    return [_write_page(*read_record(path), folder) for path in paths]


def show_studies() -> None:
    """List the studies that there are."""
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
    """Raise `ConfigError` for faults that only the shapes of payloads show, and for a model that is not there."""
    from node.train.from_config import payload_format

    for arm in study.arms:
        if arm.config.model.init and not user_path(arm.config.model.init, "model.init").is_dir():
            raise ConfigError(
                f"study {study.name} on {study.base} is skipped: model.init = {arm.config.model.init!r} is not "
                f"installed here; docs/pretrained.md says how to get it"
            )
        try:
            payload_format(arm.config)
        except ConfigError as error:
            raise ConfigError(f"study {study.name}, arm {arm.name!r}: {error}") from None


def _write_page(recipe: Recipe, study: Study, results: Results, out: Path) -> Path:
    from node.lab.study.document import document
    from node.lab.study.figures import figures
    from node.lab.study.picture import draw

    found = figures(study, results)
    draw(study, found, results, out / f"{recipe.stem}.png")
    page = out / f"{recipe.stem}.md"
    write_text(page, document(recipe, study, found, results), "--out")
    return page


def _result(run: Run) -> dict[str, object]:
    result = read_result(RESULTS, run)
    assert result is not None, f"{run.label} has been run"
    return result
