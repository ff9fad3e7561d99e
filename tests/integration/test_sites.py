"""Two sites of two shards, as four processes over gloo and sockets, compute what one process computes, in every mode.

Measured here: losses differ by at most 3e-7, gradients by at most 2e-6 of the largest entry of each, in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.isthmus_runs import free_port
from helpers.site_process import BATCH, CASES, SHARDS, SITES, config_of
from helpers.small import contexts, largest_difference, small_model
from safetensors.torch import load_file

from coordinator import ring
from coordinator.assignment import assign
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.exchange.payload import step_bytes
from node.train.from_config import payload_format
from node.train.passes import loss_sum

SCRIPT = ROOT / "tests" / "helpers" / "site_process.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all cases, from one start of the four processes."""
    found = tmp_path_factory.mktemp("sites")
    processes, logs = [], []
    for place in range(SITES):
        port = free_port()
        for rank in range(SHARDS):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SHARDS, "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": port, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            logs.append(found / f"log.{place}.{rank}")
            with logs[-1].open("wb") as log:
                command = [sys.executable, str(SCRIPT), str(place), str(found)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(240) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
    return found


def results(folder: Path, case: str) -> list[dict[str, torch.Tensor]]:
    number = list(CASES).index(case)
    return [load_file(folder / f"{number}.{place}.{rank}") for place in range(SITES) for rank in range(SHARDS)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_sites_of_shards_equal_one_process(folder: Path, case: str) -> None:
    config = config_of(case)
    spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
    model = small_model(config)
    loss = loss_sum(model, ChunkExchange(assign(4, 1), 0, payload_format(config)), contexts(config), spec)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = results(folder, case)
    assert sum(float(part["loss"]) for part in found) == pytest.approx(loss.item(), rel=3e-7)
    sharded = {name: found[0][name] for name in gradients}
    assert found[0].keys() == gradients.keys() | {"loss", "norm", "bytes"}
    assert largest_difference(sharded, gradients) < 2e-6
    norm = torch.nn.utils.get_total_norm(gradients.values())
    assert all(float(part["norm"]) == pytest.approx(float(norm), rel=1e-5) for part in found)
    assert len({float(part["norm"]) for part in found}) == 1, "all processes clip by the same bits"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_each_column_sends_what_the_formula_says(folder: Path, case: str) -> None:
    """Payloads of its part of the contexts, and gradients of its shard."""
    config = config_of(case, SHARDS)
    assert config.train.batch == BATCH
    spec = PassSpec(config.model.chunk_tokens, config.compress.compresses)
    payload, assignment = payload_format(config), assign(4, SITES)
    found = results(folder, case)
    elements = [int(part["bytes"][2]) for part in found]
    assert elements[0] == elements[2]
    assert elements[1] == elements[3]
    parameters = sum(p.numel() for p in small_model(config).parameters())
    codecs = sum(p.numel() for _, codec in small_model(config).codecs() for p in codec.parameters())
    assert elements[0] + elements[1] == parameters + codecs, "each weight in one column, the codecs' in all"
    for place in range(SITES):
        for rank in range(SHARDS):
            sent, around, n = found[place * SHARDS + rank]["bytes"].tolist()
            expected = step_bytes(payload, assignment, place, spec).total * config.train.micro_batches
            assert sent == expected
            assert around == ring.bytes_sent(n, 4, SITES, place)
