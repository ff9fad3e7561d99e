"""Runs as processes: done once, in parallel, and a failure is told in the words of the run that failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from netem.errors import ConfigError, RunAborted
from node.lab.study import pool
from node.lab.study.runs import runs_of
from node.lab.study.table import load_study

CHILD = """
import json, os, pathlib, sys
assert os.environ["OMP_NUM_THREADS"] == "1"
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
seed = job["config"]["run"]["seed"]
if seed == 7:
    print("error: train.lr = 1: too high"); sys.exit(2)
if seed == 8:
    print("error: a rank failed"); sys.exit(1)
log = pathlib.Path(sys.argv[1]).parent / "started"
log.open("a").write(job["digest"] + "\\n")
if job["keep"]:
    pathlib.Path(job["keep"]).write_text("weights")
assert not job["weights"] or pathlib.Path(job["weights"]).is_file()
pathlib.Path(sys.argv[2]).write_text(json.dumps({"heldout_loss": 1.0, "digest": job["digest"]}))
"""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Children that train nothing."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(pool, "CHILD", (sys.executable, str(script)))
    monkeypatch.setattr(pool, "POLL_S", 0.01)


def test_a_run_that_has_its_result_is_not_run_again(tmp_path: Path) -> None:
    runs = runs_of(load_study("control"), 2)
    pool.run_all(runs[:3], tmp_path / "results", 2)
    pool.run_all([*runs[:4], runs[0]], tmp_path / "results", 2)
    started = (tmp_path / "results" / "started").read_text().split()
    assert sorted(started) == sorted(run.digest for run in runs[:4])
    assert started[-1] == runs[3].digest
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ""}


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_trunk_is_run_before_its_arms_and_again_where_its_weights_are_lost(jobs: int, tmp_path: Path) -> None:
    runs, folder = runs_of(load_study("far"), 2)[:3], tmp_path / "results"
    trunk = runs[0].trunk
    assert trunk is not None
    assert trunk.trunk is not None  # it has two stages
    pool.run_all(runs, folder, jobs)
    started = (folder / "started").read_text().split()
    assert started[:2] == [trunk.trunk.digest, trunk.digest]
    assert sorted(started[2:]) == sorted(run.digest for run in runs)
    pool.weights_path(folder, trunk).unlink()
    pool.run_all(runs, folder, jobs)
    assert (folder / "started").read_text().split() == started  # nobody waits for them
    (folder / f"{runs[1].digest}.json").unlink()
    pool.run_all(runs, folder, jobs)
    assert (folder / "started").read_text().split()[len(started) :] == [trunk.digest, runs[1].digest]


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [(7, ConfigError, "dense, seed 7: train.lr = 1: too high"), (8, RunAborted, "dense, seed 8: a rank failed")],
)
def test_a_failure(seed: int, error: type[Exception], words: str, tmp_path: Path) -> None:
    run = runs_of(load_study("control"), 9)[seed * len(load_study("control").arms)]
    with pytest.raises(error, match=words):
        pool.run_all([run], tmp_path / "results", 1)
    assert not list((tmp_path / "results").glob("*.json"))


def test_a_job_holds_what_the_child_needs(tmp_path: Path) -> None:
    run = runs_of(load_study("control"), 1)[0]
    folder = tmp_path / "results"
    with pytest.raises(ConfigError):
        pool.run_all([runs_of(load_study("control"), 8)[-len(load_study("control").arms)]], folder, 1)
    (job,) = folder.glob("*.job")
    wanted = {"digest", "code", "config", "trunk", "weights", "trunk_steps", "noise", "keep"}
    assert json.loads(job.read_text()).keys() == wanted
    assert run.digest != job.stem
