"""A small world in one process: ranks as threads, joined by a dictionary in place of sockets.

It stands in for `node.exchange.wire` where a test is about arithmetic; tests/integration uses real sockets.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from node.exchange.formats import TensorSpec
from node.schedule import PassSpec

T = TypeVar("T")
TIMEOUT_S = 30.0


class Post:
    """What all ranks' wires share: tensors by address, handed over as copies, as a wire would."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[Hashable, tuple[Tensor, ...]] = {}

    def put(self, key: Hashable, tensors: tuple[Tensor, ...]) -> None:
        with self._changed:
            assert key not in self._held, f"{key} was sent twice"
            self._held[key] = tuple(tensor.detach().clone() for tensor in tensors)
            self._changed.notify_all()

    def first(self, keys: list[Any]) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: any(key in self._held for key in keys), TIMEOUT_S), keys
            return next(key for key in keys if key in self._held)

    def take(self, key: Hashable) -> tuple[Tensor, ...]:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._held, TIMEOUT_S), key
            return self._held.pop(key)


class ThreadWire:
    """One rank's end of a `Post`; the interface of `node.exchange.chunks.Wire` and of the averaging ring."""

    def __init__(self, post: Post, rank: int) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self._post, self._rank, self._pass_no = post, rank, 0

    def begin(self, pass_no: int, trains: bool) -> None:
        self._pass_no = pass_no

    def send(self, rank: int, kind: str, layer: int, chunk: int, spec: PassSpec, tensors: tuple[Tensor, ...]) -> None:
        self.sent_bytes[kind] += sum(tensor.nbytes for tensor in tensors)
        self._post.put((rank, self._rank, kind, self._pass_no, layer, chunk), tensors)

    def first_of(self, kind: str, layer: int, chunks: dict[int, int]) -> int:
        keys = [(self._rank, owner, kind, self._pass_no, layer, chunk) for chunk, owner in sorted(chunks.items())]
        return int(self._post.first(keys)[-1])

    def take(
        self, kind: str, layer: int, chunk: int, rank: int, specs: tuple[TensorSpec, ...], device: torch.device
    ) -> tuple[Tensor, ...]:
        tensors = self._post.take((self._rank, rank, kind, self._pass_no, layer, chunk))
        assert [(t.shape, t.dtype) for t in tensors] == [(spec.shape, spec.dtype) for spec in specs]
        return tensors

    def await_done(self, pass_no: int, chunk: int, rank: int) -> None:
        self._post.take((self._rank, rank, "done", pass_no, 0, chunk))

    def send_shard(self, rank: int, round_id: int, hop: int, bucket: int, shard: Tensor) -> None:
        self.sent_bytes["averaging"] += shard.nbytes
        self._post.put((rank, "ring", round_id, hop, bucket), (shard,))

    def take_shard(self, round_id: int, hop: int, bucket: int, spec: TensorSpec) -> Tensor:
        (shard,) = self._post.take((self._rank, "ring", round_id, hop, bucket))
        assert (shard.shape, shard.dtype) == (spec.shape, spec.dtype)
        return shard


def run_ranks(world_size: int, work: Callable[[int, ThreadWire], T]) -> list[T]:
    """Run `work(rank, wire)` on every rank at once; results by rank."""
    post = Post()
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(work, rank, ThreadWire(post, rank)) for rank in range(world_size)]
        return [future.result(timeout=2 * TIMEOUT_S) for future in futures]
