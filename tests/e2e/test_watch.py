"""A run of single processes, watched from its folder and from its coordinator's address; what its log says."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from helpers.isthmus_runs import QUICK, await_end, isthmus, started


def test_a_run_is_watched_from_afar_and_its_log_shows_its_progress(tmp_path: Path, cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    shared = ["configs/tiny.toml", *QUICK, "--run.outputs", tmp_path, "--run.name", "seen", "--train.steps", "30"]
    lead = ["coordinator", *shared, "--coordinator.address", address]
    follow = ["node", *shared, "--join", address]
    log = tmp_path / "lead.log"
    with started(cache, log, *lead, token="secret") as coordinator:
        # Before a node comes, so that even a quick run cannot end before somebody watches it.
        with started(cache, tmp_path / "wrong.log", "watch", address, token="wrong") as wrong:
            assert await_end(wrong, 30) == 2
        assert "does not accept this key; is it that of the run there?" in (tmp_path / "wrong.log").read_text()
        with (
            started(cache, tmp_path / "watch.log", "watch", address, token="secret") as watcher,
            started(cache, tmp_path / "node-0.log", *follow, "--rank", "0", token="secret") as one,
            started(cache, tmp_path / "node-1.log", *follow, "--rank", "1", token="secret") as two,
        ):
            ends = [await_end(process, 60) for process in (coordinator, one, two)]
            await_end(watcher, 30)  # the coordinator may have gone before the watcher saw the last step
    assert ends == [0, 0, 0], log.read_text()
    text = log.read_text()
    assert re.search(r"node-[01] \(pid \d+ on .*\) joined; 1 of 2 nodes are here", text)
    assert re.search(r"\d\d:\d\d:\d\d isthmus.coordinator: step 30/30  loss \d", text)
    assert "has gone" not in text
    seen = (tmp_path / "watch.log").read_text()
    assert re.search(r"step \d+/30 ", seen), seen
    assert "threads; 2 of the nodes run on these cores" in (tmp_path / "node-1.log").read_text()

    after = isthmus(cache, "watch", tmp_path / "seen")
    assert after.returncode == 0, after.stderr
    assert "step 30/30" in after.stdout
