"""A small world in one process: ranks as threads, joined by memory in place of sockets (`node.lab.in_process`).

It stands in for `node.exchange.wire` where a test is about arithmetic; tests/integration uses real sockets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from node.exchange.formats import TensorSpec
from node.exchange.passes import PassKey
from node.lab.in_process import MemoryWire, Post

T = TypeVar("T")
TIMEOUT_S = 30.0


class ThreadWire(MemoryWire):
    """Counts what it sends, and checks that what it takes is what was expected."""

    def __init__(self, post: Post, rank: int) -> None:
        super().__init__(post, rank)
        self.sent_bytes: Counter[str] = Counter()

    def send(self, rank: int, kind: str, layer: int, chunk: int, key: PassKey, tensors: tuple[Tensor, ...]) -> None:
        self.sent_bytes[kind] += sum(tensor.nbytes for tensor in tensors)
        super().send(rank, kind, layer, chunk, key, tensors)

    def take(
        self,
        kind: str,
        layer: int,
        chunk: int,
        rank: int,
        number: int,
        specs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        tensors = super().take(kind, layer, chunk, rank, number, specs, device)
        assert [(t.shape, t.dtype) for t in tensors] == [(spec.shape, spec.dtype) for spec in specs]
        return tensors

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None:
        self.sent_bytes["averaging"] += shard.nbytes
        super().send_shard(rank, round_id, hop, bucket, shard)

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor:
        shard = super().take_shard(round_id, hop, bucket, spec)
        assert (shard.shape, shard.dtype) == (spec.shape, spec.dtype)
        return shard


def run_ranks(world_size: int, work: Callable[[int, ThreadWire], T]) -> list[T]:
    """Run `work(rank, wire)` on every rank at once; results by rank."""
    post = Post(TIMEOUT_S)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(work, rank, ThreadWire(post, rank)) for rank in range(world_size)]
        return [future.result(timeout=2 * TIMEOUT_S) for future in futures]
