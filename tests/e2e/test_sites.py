"""Nodes that are sites of two processes: they lose nothing, go on under any layout, and leave as a whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from helpers import ROOT
from helpers.isthmus_runs import (
    QUICK,
    await_end,
    await_fault,
    await_records,
    command,
    environment,
    faults,
    free_port,
    isthmus,
    records,
    started,
    under_way,
)
from helpers.small import contexts, largest_difference
from helpers.worlds import logits_of
from safetensors.torch import load_file

from coordinator.assignment import assign
from node.config import load_config
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.train.checkpoint import load_model, vocab_size_of
from node.train.from_config import drawn_model, payload_format

EXACT = [
    *("--compress.format", "float32", "--compress.dense_format", "float32", "--train.batch", "4"),
    *("--net.profile", "unshaped", "--train.sync_format", "float32"),
]
LEARNED = [
    *("--compress.rotation", "fixed", "--compress.subspace", "learned", "--compress.dense_last_layers", "0"),
    *("--compress.budget_bytes_per_token", "150"),
]
SITES = ["--coordinator.nodes", "2", "--coordinator.shards", "2"]


def run(cache: Path, outputs: Path, name: str, *settings: str) -> Path:
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, *settings]
    done = isthmus(cache, *arguments, "--run.outputs", outputs, "--run.name", name, timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs / name


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def model(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / f"step-{step:06d}" / "model.safetensors")


C1 = ["--train.sync_every", "1", "--train.checkpoint_every", "3", *LEARNED]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sites_lose_nothing_and_their_checkpoint_goes_on_under_any_layout(tmp_path: Path, cache: Path) -> None:
    """A learned subspace, with ranks chosen for a budget, gradients averaged in each step."""
    one = run(cache, tmp_path, "one", *C1, "--coordinator.nodes", "1")
    sites = run(cache, tmp_path, "sites", *C1, *SITES)
    assert losses(sites) == pytest.approx(losses(one), rel=2e-6)
    assert {name for record in records(sites) for name in record["nodes"]} == {
        *("node-0.0", "node-0.1", "node-1.0", "node-1.1")
    }
    assert largest_difference(model(sites), model(one)) < 2e-3, "AdamW enlarges what is rounded in small gradients"
    ranks = [key for key in records(one)[2] if key.endswith("_rank")]
    assert ranks
    assert {key: records(sites)[2][key] for key in ranks} == {key: records(one)[2][key] for key in ranks}
    tokens = [record["tokens"] for record in records(one)]
    assert [record["tokens"] for record in records(sites)] == tokens

    whole = {name: tensor.clone() for name, tensor in model(sites).items()}
    shutil.rmtree(sites / "checkpoint" / "step-000006")
    names = sorted(path.name for path in (sites / "checkpoint" / "step-000003").glob("node-*"))
    assert names == [f"node-{rank}.{column}.safetensors" for rank in (0, 1) for column in (0, 1)]
    for name in ("small", "wide"):
        shutil.copytree(sites, tmp_path / name / "sites")
    run(cache, tmp_path, "sites", *C1, *SITES, "--run.resume", "true")
    assert losses(sites)[6:] == losses(sites)[3:6], "to the last bit"
    again = model(sites)
    assert all(torch.equal(again[name], whole[name]) for name in whole)

    for name, layout in (
        ("small", ("--coordinator.nodes", "1")),
        ("wide", ("--coordinator.nodes", "4")),
    ):
        folder = run(cache, tmp_path / name, "sites", *C1, *layout, "--run.resume", "true")
        assert losses(folder)[6:] == pytest.approx(losses(sites)[3:6], rel=2e-6)
        assert largest_difference(model(folder), whole) < 2e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sites_that_average_weights_are_as_nodes_that_do(tmp_path: Path, cache: Path) -> None:
    """Every three steps, with an outer step, whose momentum goes on without shards, and with shards where there were
    none. The subspace is unplugged before the end, so that a plain Llama comes of it."""
    settings = ["--train.sync_every", "3", "--train.checkpoint_every", "3", "--compress.unplug_step", "5"]
    settings += ["--train.outer_momentum", "0.5", "--train.outer_lr", "0.7"]
    nodes = run(cache, tmp_path, "nodes", *settings, "--coordinator.nodes", "2")
    sites = run(cache, tmp_path, "sites", *settings, *SITES)
    assert losses(sites) == pytest.approx(losses(nodes), rel=1e-5)
    assert records(sites)[-1]["heldout_loss"] == pytest.approx(records(nodes)[-1]["heldout_loss"], rel=1e-5)
    for record, other in zip(records(sites), records(nodes), strict=True):
        assert record["tokens"] == other["tokens"]
    assert isthmus(cache, "eval", sites, "--batches", "1").returncode == 0
    exported = isthmus(cache, "export", sites, tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    assert logits_differ(sites, tmp_path / "exported") < 1e-5
    for folder, layout in ((sites, ("--coordinator.nodes", "2")), (nodes, SITES)):
        shutil.rmtree(folder / "checkpoint" / "step-000006")
        run(cache, tmp_path, folder.name, *settings, *layout, "--run.resume", "true")
        assert losses(folder)[6:] == pytest.approx(losses(nodes)[3:6], rel=1e-5)


def logits_differ(folder: Path, exported: Path) -> float:
    """How far transformers' logits are from ours, of the largest of them."""
    from transformers import AutoModelForCausalLM

    config, checkpoint = load_config(folder / "config.toml"), folder / "checkpoint" / "step-000006"
    ours = drawn_model(config, vocab_size_of(checkpoint))
    load_model(checkpoint, ours)
    exchange = ChunkExchange(assign(config.model.chunks, 1), 0, payload_format(config))
    tokens = torch.from_numpy(contexts(config)[:2, :-1])
    own = tokens.unflatten(1, (config.model.chunks, -1)).movedim(1, 0)
    with torch.no_grad():
        logits = logits_of(ours, own, exchange, PassSpec(config.model.chunk_tokens, False)).movedim(0, 1).flatten(1, 2)
        theirs = AutoModelForCausalLM.from_pretrained(exported)(tokens).logits
    return float((logits - theirs).abs().max() / logits.abs().max())


def process_of(parent: int, rank: int, local_rank: int) -> psutil.Process:
    for child in psutil.Process(parent).children():
        line = child.cmdline()
        own = "--rank" in line and line[line.index("--rank") + 1] == str(rank)
        if own and child.environ().get("LOCAL_RANK") == str(local_rank):
            return child
    raise AssertionError(f"no process {local_rank} of node {rank}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_is_killed_takes_its_site_along_and_the_others_go_on(tmp_path: Path, cache: Path) -> None:
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, "--train.sync_every", "1"]
    arguments += ["--train.steps", "40", "--train.eval_every", "0", "--coordinator.heartbeat_timeout_s", "8"]
    arguments += ["--coordinator.nodes", "3", "--coordinator.shards", "2", "--run.outputs", str(tmp_path)]
    folder = tmp_path / "tiny"
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(folder, 4, process, 240.0)
        killed_s = time.time()
        process_of(process.pid, 1, 1).kill()
        assert await_end(process, 240) == 0, (tmp_path / "log").read_text()
    assert [record["step"] for record in records(folder)] == list(range(1, 41)), "each step counts once"
    assert set(records(folder)[-1]["nodes"]) == {"node-0.0", "node-0.1", "node-2.0", "node-2.1"}
    (fault,) = faults(folder)
    assert set(fault["nodes"]) == {"node-1.0", "node-1.1"}
    assert "site node-1 leaves as a whole" in fault["reason"]
    assert "has 2 nodes (node-0, node-2)" in fault["done"]
    goes_on_s = fault["time"] - killed_s
    print(f"went on {goes_on_s:.1f} s after the kill")
    assert goes_on_s < 2 * 8 + 5
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert "another process of this site was lost: connection" in logs["node-1.0.log"]
    assert not [name for name, text in logs.items() if "Traceback" in text]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_stops_holds_its_own_site_up_and_no_other(tmp_path: Path, cache: Path) -> None:
    """The other process of the site waits in a collective, which torch cannot cancel, and ends itself."""
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, *SITES, "--train.sync_every", "1", "--train.steps", "2000"]
    arguments += ["--train.eval_every", "0", "--coordinator.step_timeout_s", "20", "--run.outputs", str(tmp_path)]
    folder = tmp_path / "tiny"
    with started(cache, tmp_path / "log", *arguments) as process:
        await_records(folder, 4, process, 240.0)
        mate = process_of(process.pid, 1, 0)
        process_of(process.pid, 1, 1).suspend()
        lost = await_fault(folder, "lost", 30.0)
        assert set(lost["nodes"]) == {"node-1.0", "node-1.1"}
        assert "node-1.1" in lost["reason"]
        await_records(folder, len(records(folder)) + 3, process, 60.0)
        assert set(records(folder)[-1]["nodes"]) == {"node-0.0", "node-0.1"}
        psutil.wait_procs([mate], 60.0)
        told = (folder / "logs" / "node-1.0.log").read_text()
        assert "and this process still waits for another one of its site" in told
        process.send_signal(signal.SIGINT)
        await_end(process, 60.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_that_is_started_again_gets_its_shards_from_the_others(tmp_path: Path, cache: Path) -> None:
    arguments = ["run", "configs/tiny.toml", *QUICK, *EXACT, *SITES, "--train.sync_every", "1", "--train.steps", "2000"]
    folder = tmp_path / "tiny"
    with (
        started(
            cache, tmp_path / "log", *arguments, "--train.eval_every", "0", "--run.outputs", tmp_path, token="secret"
        ) as process,
        ExitStack() as again,
    ):
        await_records(folder, 4, process, 240.0)
        process_of(process.pid, 1, 0).kill()
        await_fault(folder, "failed", 30.0)
        address, port = (folder / "coordinator.address").read_text().strip(), str(free_port())
        for rank in ("0", "1"):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": port} | environment(cache, "secret")
            words = command("node", folder / "config.toml", "--join", address, "--name", "node-1")
            again.enter_context(under_way(words, ROOT, variables, tmp_path / f"again.{rank}"))
        joined = await_fault(folder, "joined", 120.0)
        assert set(joined["nodes"]) == {"node-1.0", "node-1.1"}
        await_records(folder, len(records(folder)) + 3, process, 120.0)
        assert set(records(folder)[-1]["nodes"]) == {"node-0.0", "node-0.1", "node-1.0", "node-1.1"}
        process.send_signal(signal.SIGINT)
        await_end(process, 60.0)
    steps = [record["step"] for record in records(folder)]
    assert steps == list(range(1, len(steps) + 1)), "each step counts once"
    assert [fault["kind"] for fault in faults(folder)] == ["failed", "joined"], "digests agreed in both columns"
    for rank in ("0", "1"):
        told = (tmp_path / f"again.{rank}").read_text()
        assert "bytes of state after step" in told
        assert f"from node-0.{rank}" in told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_starts_a_site_and_a_site_of_another_size_is_told_why_not(tmp_path: Path, cache: Path) -> None:
    settings = [*QUICK, *EXACT, "--train.sync_every", "1", "--coordinator.nodes", "1"]
    settings += ["--coordinator.shards", "2", "--run.outputs", str(tmp_path)]
    serve = ["coordinator", "configs/tiny.toml", *settings]
    with started(cache, tmp_path / "log", *serve, token="secret") as process:
        address = tmp_path / "tiny" / "coordinator.address"
        deadline = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        node = ["node", "configs/tiny.toml", *settings, "--join", address.read_text().strip()]
        alone = isthmus_in(cache, [sys.executable, "-m", "node.cli", *node])
        assert alone.returncode != 0
        assert "coordinator.shards = 2: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set here" in (
            alone.stderr
        )
        assert "Traceback" not in alone.stderr
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
        site = isthmus_in(cache, [*torchrun, "--nproc-per-node", "2", "-m", "node.cli", *node, "--name", "berlin"])
        assert site.returncode == 0, site.stderr
        assert await_end(process, 60) == 0
    assert set(records(tmp_path / "tiny")[-1]["nodes"]) == {"berlin.0", "berlin.1"}


def isthmus_in(cache: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    variables = environment(cache, "secret") | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)
