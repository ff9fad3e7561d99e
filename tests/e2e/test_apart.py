"""A run whose machines share no disk: its checkpoints come together at the coordinator, and go out again from there."""

from __future__ import annotations

import random
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.isthmus_runs import QUICK, await_end, isthmus, records, started

TINY = "configs/tiny.toml"
TOKEN = "a-long-secret-for-this-test"
LIMIT_S = 90.0


def train(folder: Path, cache: Path, nodes: int, outputs: list[str], *settings: str, expected: int = 0) -> str:
    """A coordinator and nodes, each with a folder of its own; what they printed."""
    shared = [TINY, *QUICK, "--train.sync_every", "1", "--train.checkpoint_every", "3"]
    shared += ["--run.name", "apart", "--coordinator.nodes", str(nodes), *settings]
    (folder / "lead" / "apart" / "coordinator.address").unlink(missing_ok=True)  # of a run before
    with ExitStack() as stack:
        lead = ["coordinator", *shared, "--run.outputs", str(folder / "lead")]
        processes = [stack.enter_context(started(cache, folder / "lead.log", *lead, token=TOKEN))]
        address = _address(folder / "lead" / "apart")
        for rank, place in enumerate(outputs):
            node = ["node", *shared, "--join", address, "--rank", str(rank), "--run.outputs", str(folder / place)]
            processes.append(stack.enter_context(started(cache, folder / f"{place}.log", *node, token=TOKEN)))
        codes = [await_end(process, LIMIT_S) for process in processes]
    text = "".join((folder / f"{name}.log").read_text() for name in ("lead", *outputs))
    assert codes == [expected] * len(codes), text
    return text


def _address(run: Path) -> str:
    deadline_s = time.monotonic() + LIMIT_S
    while not (run / "coordinator.address").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return (run / "coordinator.address").read_text().strip()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.timeout(400)
def test_it_is_evaluated_and_resumed_from_the_coordinators_folder(tmp_path: Path, cache: Path) -> None:
    text = train(tmp_path, cache, 2, ["a", "b"], "--train.steps", "6")
    whole = tmp_path / "lead" / "apart" / "checkpoint" / "step-000006"
    assert files(whole) == ["COMPLETE.json", "model.safetensors", "node-0.safetensors", "node-1.safetensors"]
    for place, name in (("a", "node-0"), ("b", "node-1")):
        own = tmp_path / place / "apart" / "checkpoint" / "step-000006" / f"{name}.safetensors"
        assert own.read_bytes() == (whole / own.name).read_bytes()
    assert len(re.findall(r"the coordinator has node-\d.safetensors after step 6", text)) == 2
    result = isthmus(cache, "eval", tmp_path / "lead" / "apart", "--batches", "1")
    assert result.returncode == 0, result.stderr
    before = records(tmp_path / "lead" / "apart")

    # New machines, whose disks are empty: each gets its part from the coordinator, and nothing is lost.
    text = train(tmp_path, cache, 2, ["c", "d"], "--train.steps", "9", "--run.resume", "true")
    assert len(re.findall(r"got node-\d.safetensors after step 6 from the coordinator", text)) == 2
    after = records(tmp_path / "lead" / "apart")
    assert [record["step"] for record in after] == list(range(1, 10))
    assert after[5]["loss"] == before[5]["loss"]
    straight = tmp_path / "straight"
    straight.mkdir()
    train(straight, cache, 2, ["a", "b"], "--train.steps", "9")
    losses = [record["loss"] for record in records(straight / "lead" / "apart")]
    assert [record["loss"] for record in after] == pytest.approx(losses, rel=2e-7)

    # Another number of machines: the parts of both old ranks are dealt anew.
    text = train(tmp_path, cache, 1, ["e"], "--train.steps", "12", "--run.resume", "true")
    assert len(re.findall(r"got node-\d.safetensors after step 9 from the coordinator", text)) == 2
    assert records(tmp_path / "lead" / "apart")[-1]["step"] == 12


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_by_setting_each_part_stays_on_its_machine(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, 2, ["a", "b"], "--train.steps", "3", "--train.collect", "false")
    assert files(tmp_path / "lead" / "apart" / "checkpoint" / "step-000003") == ["COMPLETE.json"]
    assert files(tmp_path / "b" / "apart" / "checkpoint" / "step-000003") == ["node-1.safetensors"]


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_on_a_shared_folder_nothing_is_sent(tmp_path: Path, cache: Path) -> None:
    run = ["run", TINY, *QUICK, "--run.outputs", tmp_path, "--run.name", "one"]
    done = isthmus(cache, *run)
    assert done.returncode == 0, done.stderr
    logs = "".join(path.read_text() for path in (tmp_path / "one" / "logs").iterdir())
    assert "bytes were sent" not in logs
    assert "node-1.safetensors" in files(tmp_path / "one" / "checkpoint" / "step-000006")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_must_tokenise_first_joins_meanwhile(tmp_path: Path) -> None:
    """Tokenising takes longer than the rendezvous waits. The others do not begin without it."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(draw.choices(words, k=2000)) for _ in range(6000)))
    shared = [TINY, *QUICK, "--run.name", "late", "--coordinator.nodes", "2", "--coordinator.join_timeout_s", "25"]
    shared += ["--data.corpus", str(corpus), "--data.tokenizer", "gpt2", "--data.max_tokens", "0"]
    done = isthmus(tmp_path / "ready", "data", "prepare", *shared, timeout_s=300)
    assert done.returncode == 0, done.stderr
    with ExitStack() as stack:
        lead = ["coordinator", *shared, "--run.outputs", str(tmp_path / "lead")]
        processes = [stack.enter_context(started(tmp_path / "ready", tmp_path / "lead.log", *lead, token=TOKEN))]
        address = _address(tmp_path / "lead" / "late")
        for name in ("ready", "empty"):
            node = ["node", *shared, "--join", address, "--name", name, "--run.outputs", str(tmp_path / name)]
            processes.append(
                stack.enter_context(started(tmp_path / name, tmp_path / f"{name}.log", *node, token=TOKEN))
            )
        codes = [await_end(process, 300) for process in processes]
    late = (tmp_path / "empty.log").read_text()
    assert codes == [0, 0, 0], late
    assert "the corpus is still being prepared; joining meanwhile" in late
    assert "joining meanwhile" not in (tmp_path / "ready.log").read_text()
