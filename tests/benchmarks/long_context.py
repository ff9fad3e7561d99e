"""The memory and the time of one training step over a long context of one novel, on this CPU.

    PYTHONPATH=tests:. python tests/benchmarks/long_context.py [--tokens N] [--nodes N] [--no-recompute]

One forward and one backward over the first N bytes of Moby-Dick, in a model of two narrow layers that both compress.
The nodes are threads of this process; what they send each other is handed over in memory, in the formats of the wire.
All figures are of all nodes together. "Kept" is how much more memory the process has after the forward than before it,
and "peak" is the most that it ever had.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import torch

from coordinator.assignment import Assignment
from netem.config import convert
from node.config import Config
from node.data.batches import Contexts
from node.data.files import EmbeddedNovels
from node.exchange.chunks import ChunkExchange
from node.exchange.passes import PassSpec
from node.lab.in_process import MemoryWire, Post
from node.model.exchanged import ExchangedLlama
from node.train.from_config import drawn_model, payload_format
from node.train.passes import loss_sum

VOCABULARY = 257
TIMEOUT_S = 7200.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of one step over a long context of one novel.")
    parser.add_argument("--tokens", type=int, default=131072, help="bytes of the novel (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that share the context (default: %(default)s)")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false", help="run.recompute off")
    options = parser.parse_args()
    config = convert(
        Config,
        {
            "run": {"recompute": options.recompute},
            "model": {
                "layers": 2,
                "d_model": 32,
                "heads": 1,
                "kv_heads": 1,
                "head_dim": 16,
                "ffn_dim": 96,
                "context": options.tokens,
                "chunks": 8,
            },
            "train": {"batch": 1},
            "data": {"tokenizer": "bytes"},
            "coordinator": {"nodes": options.nodes, "token": "none", "assignment": "zigzag"},
        },
    )
    print(json.dumps(vars(options) | measure(config, first_bytes(options.tokens))))


def first_bytes(tokens: int) -> Contexts:
    """The first bytes of the novel as one context, [1, T + 1]."""
    text = max((document.text for document in EmbeddedNovels().documents()), key=len).encode()
    assert len(text) > tokens, f"the longest novel has {len(text)} bytes"
    return np.frombuffer(text, np.uint8, tokens + 1).astype(np.int64)[None]


def measure(config: Config, contexts: Contexts) -> dict[str, float]:
    """One step of all nodes: seconds, CPU seconds, and MB of memory."""
    assignment: Assignment = config.assignment()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other burn most of the time
    post, together = Post(TIMEOUT_S), Barrier(assignment.n_ranks, timeout=TIMEOUT_S)
    spec = PassSpec(config.model.chunk_tokens, compressed=True)
    before_mb = resident_mb()
    began_s, began_cpu_s = time.monotonic(), time.process_time()

    def work(rank: int) -> tuple[float, float]:
        model = make_model(config)
        wire = MemoryWire(post, rank) if assignment.n_ranks > 1 else None
        loss = loss_sum(model, ChunkExchange(assignment, rank, payload_format(config), wire), contexts, spec)
        together.wait()
        kept_mb = resident_mb() - before_mb
        together.wait()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), kept_mb

    with ThreadPoolExecutor(assignment.n_ranks) as pool:
        results = list(pool.map(work, range(assignment.n_ranks)))
    return {
        "loss": sum(loss for loss, _ in results) / contexts[:, 1:].size,
        "seconds": round(time.monotonic() - began_s, 1),
        "cpu_seconds": round(time.process_time() - began_cpu_s, 1),
        "before_mb": round(before_mb),
        "kept_mb": round(max(kept for _, kept in results)),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def make_model(config: Config) -> ExchangedLlama:
    """A model whose subspaces are any: a step's memory and time do not depend on which."""
    model = drawn_model(config, VOCABULARY)
    for _, codec in model.codecs():
        codec.set_moments(torch.eye(codec.shape.width).expand(codec.shape.groups, -1, -1).contiguous())
        codec.start()
    return model


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
