"""The names of what a run writes, and when a checkpoint counts."""

from pathlib import Path

from coordinator.records.folder import (
    checkpoint_folder,
    is_complete,
    latest_complete,
    mark_complete,
    read_mark,
    step_of,
)


def test_a_checkpoint_counts_once_it_is_marked(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path, 200)
    assert folder == tmp_path / "checkpoint" / "step-000200"
    folder.mkdir(parents=True)
    (folder / "node-0.safetensors").write_bytes(b"")
    assert not is_complete(folder)
    assert latest_complete(tmp_path) is None
    mark_complete(tmp_path, 200, nodes=4)
    assert is_complete(folder)
    assert latest_complete(tmp_path) == folder
    assert (step_of(folder), *read_mark(folder)) == (200, 200, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE.json", "node-0.safetensors"]


def test_the_latest_is_that_of_the_most_steps_among_complete_ones(tmp_path: Path) -> None:
    """By number: a million sorts before two hundred thousand as text."""
    for step in (999_999, 1_000_000, 20):
        mark_complete(tmp_path, step, nodes=1)
    checkpoint_folder(tmp_path, 2_000_000).mkdir()
    assert latest_complete(tmp_path) == checkpoint_folder(tmp_path, 1_000_000)


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    assert [step_of(tmp_path / name) for name in ("step-7", "step-", "step-7x", "run")] == [7, -1, -1, -1]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "never-ran") is None


def test_marking_twice_is_harmless(tmp_path: Path) -> None:
    mark_complete(tmp_path, 5, nodes=2)
    mark_complete(tmp_path, 5, nodes=3)
    assert read_mark(checkpoint_folder(tmp_path, 5)).nodes == 3
